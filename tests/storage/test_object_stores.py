from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from artifacts.errors import BlobCorrupt, BlobStoreUnavailable
from storage import blobs as blobs_module
from storage.blobs import BlobStore, key_of

DATA = bytes(range(256)) * 12_000  # about 3 MB: several chunks


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def staged(folder: Path, data: bytes, name: str = "staged") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.s3
def test_large_files_go_up_in_parts(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "SINGLE_PUT_LIMIT", 1 << 20)
    monkeypatch.setattr(blobs_module, "PART_SIZE", 5 << 20)
    data = os.urandom(1 << 20) * 12
    store = BlobStore(f"s3://{s3_bucket}")
    assert store.put_file(staged(tmp_path, data), sha256(data)) == len(data)
    assert store.materialize(sha256(data), tmp_path / "cache").read_bytes() == data


@pytest.mark.s3
@pytest.mark.parametrize("limit", [1 << 20, 1 << 30])
def test_a_file_with_another_digest_is_not_kept(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(blobs_module, "SINGLE_PUT_LIMIT", limit)
    monkeypatch.setattr(blobs_module, "PART_SIZE", 5 << 20)
    data = os.urandom(1 << 20) * 12
    store = BlobStore(f"s3://{s3_bucket}")
    with pytest.raises(BlobCorrupt, match="does not have the SHA-256"):
        store.put_file(staged(tmp_path, data), "0" * 64)
    assert not store.exists("0" * 64)
    assert list(store.iter_digests()) == []


@pytest.mark.s3
def test_two_stores_of_one_bucket_are_apart(s3_bucket: str) -> None:
    first, second = BlobStore(f"s3://{s3_bucket}/one"), BlobStore(f"s3://{s3_bucket}/two/")
    digest = first.put_bytes(b"x")
    assert first.exists(digest)
    assert not second.exists(digest)


@pytest.mark.s3
def test_bytes_that_changed_in_the_bucket_are_noticed(s3_bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    import boto3

    store = BlobStore(f"s3://{s3_bucket}")
    digest = store.put_bytes(DATA)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_endpoint)
    client.put_object(Bucket=s3_bucket, Key=key_of(digest), Body=DATA[:-1] + b"!")
    client.close()
    with pytest.raises(BlobCorrupt):
        store.materialize(digest, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.s3
def test_a_missing_bucket_is_unavailable(s3_bucket: str) -> None:
    store = BlobStore(f"s3://{s3_bucket}-none")
    with pytest.raises(BlobStoreUnavailable):
        store.check()
    with pytest.raises(BlobStoreUnavailable):
        store.put_bytes(b"x")


def test_a_server_that_does_not_answer_is_unavailable(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    aws.setattr("storage.object_stores.RETRIES", {"max_retries": 0})
    store = BlobStore("s3://bucket")
    for call in (store.check, lambda: store.put_bytes(b"x"), lambda: store.exists("0" * 64)):
        with pytest.raises(BlobStoreUnavailable, match="s3://bucket"):
            call()


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:9000", "http://[::1]:9000", "http://10.1.2.3", "http://s3:9000", "https://s3.example.org"],
)
def test_endpoints_that_may_be_used(aws: pytest.MonkeyPatch, endpoint: str) -> None:
    aws.setenv("AWS_ENDPOINT_URL", endpoint)
    BlobStore("s3://bucket")


def test_plain_http_over_the_internet_has_to_be_asked_for(aws: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://s3.example.org", "http://8.8.8.8:9000"):
        aws.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(BlobStoreUnavailable) as caught:
            BlobStore("s3://bucket")
        assert "AWS_ALLOW_HTTP" in (caught.value.hint or "")
    aws.setenv("AWS_ALLOW_HTTP", "true")
    BlobStore("s3://bucket")


@pytest.mark.s3
def test_credentials_come_from_a_profile(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text("[lab]\naws_access_key_id = from-profile\naws_secret_access_key = secret\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = BlobStore(f"s3://{s3_bucket}")
    assert store.exists(store.put_bytes(b"x"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(BlobStoreUnavailable, match="'nobody'"):
        BlobStore(f"s3://{s3_bucket}")


def test_a_profile_without_boto3_names_the_extra(aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.setenv("AWS_PROFILE", "lab")
    aws.setitem(sys.modules, "obstore.auth.boto3", None)
    with pytest.raises(BlobStoreUnavailable, match="needs boto3") as caught:
        BlobStore("s3://bucket")
    assert "rankwise[s3]" in (caught.value.hint or "")


def test_an_old_blob_is_written_again_so_that_no_sweep_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore("memory://")
    digest = store.put_bytes(DATA)
    first = next(store.iter_blobs()).modified
    store.put_bytes(DATA)
    assert next(store.iter_blobs()).modified == first
    monkeypatch.setattr(blobs_module, "FRESH", timedelta(seconds=-5))
    store.put_bytes(DATA)
    assert next(store.iter_blobs()).modified > first
    assert b"".join(store.stream(digest)) == DATA


def test_no_staging_folder() -> None:
    store = BlobStore("memory://")
    assert store.staging_dir is None
    assert store.remove_stale_staging(datetime.now(UTC)) == 0


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield monkeypatch
