"""The job kind "push": an adapter is sent to a hub, or written to a bucket as an OCI image layout."""

from __future__ import annotations

from functools import partial
from typing import Any

from artifacts.pointers import pointers_below
from storage import adapters
from storage.buckets import Bucket
from storage.downloads import DownloadFormat
from storage.tables import AdapterRow
from storage.written_downloads import ERROR_HEADER, Wish
from workers import hub_push, oci_push
from workers.context import JobContext, JobOutcome
from workers.hub_push import HubTarget
from workers.oci_layout import manifest_of
from workers.pushed_files import PushedFile, Tell, write_files
from workers.watched_work import watched
from workers.written_adapters import downloads_of

WRITTEN = 0.4


def run(context: JobContext) -> JobOutcome:
    """Send the adapter that the job's parameters name.

    `params`: {adapter, hub | oci, format, dtype, rank}.

    Raises:
        NotFound: the adapter was deleted since the job was submitted.
        RequestInvalid and its kin: the format can not hold it, or it is not taken there.
        RemoteUnavailable, BlobStoreUnavailable, DiskFull
        AttemptCancelled, AttemptStale
    """
    params = context.params
    with context.database.read() as session:
        row = adapters.get_adapter(session, params["adapter"])
    layout: DownloadFormat = params.get("format") or "peft"
    context.progress(0.0, "writing the adapter")
    with pointers_below("", instead_of="/query"):
        download = downloads_of(context).of(row, Wish(layout, params.get("dtype"), params.get("rank")))
    files = write_files(
        context.blobs,
        row,
        download,
        layout,
        context.scratch / "pushed",
        _teller(context, 0.0, WRITTEN, "writing the adapter"),
    )
    error = download.headers.get(ERROR_HEADER)
    report = {
        "adapter": row.id,
        "format": layout,
        "dtype": params.get("dtype"),
        "rank": params.get("rank"),
        "relative_error": None if error is None else float(error),
        "files": [{"path": file.name, "sha256": file.sha256, "size": file.size} for file in files],
    }
    sent = _to_hub(context, row, files) if params.get("hub") is not None else _to_bucket(context, row, layout, files)
    return JobOutcome(report={**report, **sent})


def _to_hub(context: JobContext, row: AdapterRow, files: tuple[PushedFile, ...]) -> dict[str, Any]:
    wanted, remotes = context.params["hub"], context.spec.remotes
    hub, token = remotes.check_push_repo(wanted["repo"], wanted.get("token"))
    target = HubTarget(hub, token, wanted["repo"], wanted["revision"], wanted.get("path"), wanted["private"])
    context.progress(WRITTEN, f"sending {sum(file.size for file in files) >> 20} MiB to {target.repo}")
    made = hub_push.push(
        target,
        files,
        wanted.get("message") or f"{row.name} ({row.id})",
        timeout_seconds=remotes.timeout_seconds,
        check_stop=context.check_cancelled,
    )
    return {"hub": {"hub": hub, "repo": target.repo, "revision": target.revision, **made}}


def _to_bucket(context: JobContext, row: AdapterRow, layout: str, files: tuple[PushedFile, ...]) -> dict[str, Any]:
    wanted, remotes = context.params["oci"]["s3"], context.spec.remotes
    # A push names a prefix: the keys below it are its own.
    with pointers_below("/oci"), pointers_below("/s3/prefix", instead_of="/s3/key"):
        remotes.check_push_bucket(wanted["bucket"], wanted["prefix"])
        made = manifest_of(row, layout, context.params.get("dtype") or row.dtype.lower(), files)
        tell = _teller(context, WRITTEN, 1.0, "writing the layout")
        tag = context.params["oci"].get("tag") or "latest"
        bucket = Bucket(wanted["bucket"])
        work = partial(oci_push.push, bucket, wanted["prefix"], tag, made, files, tell)
        sent = watched(work, remotes.timeout_seconds, context.check_cancelled, "sent")
    return {"oci": sent}


def _teller(context: JobContext, begin: float, end: float, message: str) -> Tell:
    def tell(done: int, total: int | None) -> None:
        context.progress(begin + (end - begin) * done / (total or 1), message)

    return tell
