"""An OCI image layout written below a prefix of a bucket: blobs first, the index last, other tags left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from artifacts.errors import Conflict
from storage.buckets import Bucket
from workers.oci_layout import LAYOUT_FILE, ModelManifest, index_with
from workers.pushed_files import PushedFile, Tell

_TRIES = 8


def push(
    bucket: Bucket, prefix: str, tag: str, made: ModelManifest, files: Sequence[PushedFile], tell: Tell
) -> dict[str, Any]:
    """Write what is not there yet, and name it in the index.

    Returns:
        {digest, tag, url}.

    Raises:
        RemoteUnavailable: the bucket can not be used.
        FileBroken: something else lies at the place of the index.
        Conflict: the index was changed by others again and again.
    """
    place = f"{prefix}/blobs/sha256"
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        if not bucket.holds(f"{place}/{file.sha256}", file.size):
            bucket.put_file(f"{place}/{file.sha256}", file.path)
        done += file.size
        tell(done, total)
    for data in (made.config, made.manifest):
        bucket.put_bytes(f"{place}/{digest_name(data)}", data)
    bucket.put_bytes(f"{prefix}/oci-layout", LAYOUT_FILE)
    for _ in range(_TRIES):
        old, version = bucket.get_small(f"{prefix}/index.json")
        if bucket.replace(f"{prefix}/index.json", index_with(old, made.descriptor(tag)), version):
            return {"digest": made.digest, "tag": tag, "url": f"s3://{bucket.name}/{prefix}"}
    raise Conflict("The index of the OCI layout is being changed by others again and again.", hint="Try again.")


def digest_name(data: bytes) -> str:
    """The name of a blob."""
    return hashlib.sha256(data).hexdigest()
