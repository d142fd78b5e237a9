"""The job kind "import": an adapter is fetched from a hub, a URL or a bucket, and taken in like an upload."""

from __future__ import annotations

from typing import Any

from artifacts import intake
from artifacts.layout import AdapterLayout, read_layout
from artifacts.pointers import pointers_below
from storage.base_configs import BaseConfigs
from storage.declared_bases import check_declared, declared_base
from workers.adapter_names import name_of_files
from workers.context import JobContext, JobOutcome, NewAdapter
from workers.remote_sources import FetchedAdapter, fetch

FETCHED = 0.9
_LISTED = 50


def run(context: JobContext) -> JobOutcome:
    """Fetch the adapter that the job's parameters name.

    `params`: {source, name, base_model, description, tags}.

    Raises:
        RequestInvalid and its kin: the source is not allowed, not there or too large; or it is no adapter, as for
            uploads.
        RemoteUnavailable, BlobStoreUnavailable, DiskFull
        AttemptCancelled, AttemptStale
    """
    params, remotes = context.params, context.spec.remotes

    def tell(done: int, total: int | None) -> None:
        message = f"fetched {done >> 20} MiB" + (f" of {total >> 20}" if total else "")
        context.progress(FETCHED * min(1.0, done / total) if total else 0.0, message)

    context.progress(0.0, "asking for the adapter's files")
    with pointers_below("/source"):
        fetched = fetch(params["source"], remotes, context.scratch / "fetched", tell, context.check_cancelled)
    context.progress(FETCHED, "reading the adapter")
    staged = [(name, file.path) for name, file in fetched.files]
    digests = {file.path: file.sha256 for _, file in fetched.files}
    with context.database.read() as session:
        model, base_name = declared_base(session, params.get("base_model"))
    configs = BaseConfigs(context.database, context.blobs, context.spec.model_roots)
    directory = intake.receive(
        staged,
        context.scratch / "intake",
        intake.IntakeLimits(max_bytes=remotes.max_bytes),
        digests=digests,
        base_config=None if model is None else configs.of_model(model),
    )
    layout = read_layout(directory)
    if model is not None:
        check_declared(model, layout.modules)
    new = NewAdapter(
        directory=directory,
        name=params.get("name") or name_of_files([f"{fetched.title}.safetensors"]),
        description=params.get("description") or "",
        tags=tuple(params.get("tags") or ()),
        base_model=base_name,
        model_id=None if model is None else model.id,
        source=fetched.origin,
    )
    return JobOutcome((new,), _report(fetched, layout))


def _report(fetched: FetchedAdapter, layout: AdapterLayout) -> dict[str, Any]:
    """Where it was from, and in short what became of its keys; `GET /adapters/{id}/keys` tells of each."""
    ignored = [{"key": item.key, "reason": item.reason} for item in layout.match.ignored]
    return {
        "source": dict(fetched.origin),
        "format": layout.format,
        "method": layout.config.method,
        "modules": len(layout.modules),
        "used_keys": len(layout.match.used),
        "ignored_keys": len(ignored),
        "ignored": ignored[:_LISTED],
        "warnings": list(layout.match.warnings)[:_LISTED],
    }
