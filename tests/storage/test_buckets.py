"""Objects of buckets that are not the blob store, on a real S3 endpoint."""

from __future__ import annotations

import os

import boto3
import pytest
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from artifacts.errors import RemoteUnavailable, RequestInvalid
from storage import buckets
from storage.buckets import Bucket


def put(bucket: str, **objects: bytes) -> None:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key, data in objects.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)
    client.close()


def test_objects_are_found_listed_as_a_folder_and_read(s3_bucket: str) -> None:
    large = os.urandom(3 << 20)
    put(s3_bucket, **{"loras/a.bin": large, "loras/b.txt": b"b", "loras/deep/c.txt": b"c", "loras2/d.txt": b"d"})
    bucket = Bucket(s3_bucket)
    found = bucket.children("loras")
    assert [(item.key, item.size) for item in found] == [("loras/a.bin", 3 << 20), ("loras/b.txt", 1)]
    assert b"".join(bucket.read(found[0])) == large
    item = bucket.find("loras/a.bin")
    assert item == found[0]
    put(s3_bucket, **{"loras/a.bin": b"changed"})
    with pytest.raises(RemoteUnavailable):  # it is another object by now
        b"".join(bucket.read(item))


def test_a_folder_is_listed_however_much_lies_below_it(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MAX_OBJECTS", 2)
    put(s3_bucket, **{"loras/a.bin": b"a", **{f"loras/deep/{number}": b"x" for number in range(5)}})
    assert [item.key for item in Bucket(s3_bucket).children("loras")] == ["loras/a.bin"]
    with pytest.raises(RequestInvalid, match="more than 2 objects") as caught:
        Bucket(s3_bucket).children("loras/deep")
    assert caught.value.errors[0].pointer == "/s3/prefix"


@pytest.mark.parametrize("error", [PermissionDeniedError, UnauthenticatedError])
def test_what_is_not_allowed_is_refused_and_not_tried_again(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: object) -> None:
        raise error("AccessDenied")

    monkeypatch.setattr(buckets.obstore, "head", refuse)
    with pytest.raises(RequestInvalid, match=r"does not allow 'a\.zip'") as caught:
        Bucket(s3_bucket).find("a.zip")
    assert caught.value.errors[0].pointer == "/s3/key"


def test_what_is_not_there_says_so(s3_bucket: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        Bucket(s3_bucket).find("nothing.zip")
    assert caught.value.errors[0].pointer == "/s3/key"
    assert Bucket(s3_bucket).children("nothing") == []
    with pytest.raises((RequestInvalid, RemoteUnavailable)):
        Bucket("no-such-bucket-here").find("x")
