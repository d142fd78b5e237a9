"""The results of an attempt become visible: all of them at once or none."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from artifacts import intake
from artifacts.base_model import BaseModelRef, inspect_base
from artifacts.content import file_sha256
from artifacts.errors import BlobStoreUnavailable, DatabaseUnavailable
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, checkpoints, claims, images, made_models, previews, sealed_inputs
from storage.sweep import remove_unused
from storage.tables import ModelRow
from workers.context import JobContext, JobOutcome, NewModel

log = structlog.get_logger(__name__)


def publish(context: JobContext, outcome: JobOutcome) -> dict[str, Any]:
    """Make the results of an attempt visible, all of them at once or none.

    Blobs first: they are content-addressed, so that writing them twice is writing them once, and those of an attempt
    that dies here are swept. Then one transaction, which holds only while the attempt owns the job.

    Returns:
        The job's result.

    Raises:
        AttemptCancelled, AttemptStale: nothing was published.
        RequestInvalid: a directory holds no adapter (a bug of the job's function).
    """
    inspected = [(new, intake.inspect(new.directory, base_model=new.base_model)) for new in outcome.adapters]
    pictures = [(image, [file.stored() for file in image.files]) for image in outcome.images]
    files = [(entry, new.directory / entry.path) for new, manifest in inspected for entry in manifest.files]
    files += outcome.files
    for image, stored in pictures:
        files += [(item.entry, file.path) for item, file in zip(stored, image.files, strict=True)]
    made = [described(context, new) for new in outcome.models]
    for model, (_, entries) in zip(outcome.models, made, strict=True):
        files += [(entry, model.directory / entry.path) for entry in entries]
    with context.database.write() as session:
        adapters.reserve_blobs(session, [entry for entry, _ in files])
    for entry, path in files:
        context.blobs.put_file(path, entry.sha256)
    spec = context.spec
    with context.database.write() as session:
        job = claims.fence(session, spec.job_id, spec.attempt)
        rows = [
            made_models.add_made_model(
                session, ref, entries, recipe=model.recipe, job_id=spec.job_id, created_by=job.created_by
            )
            for model, (ref, entries) in zip(outcome.models, made, strict=True)
        ]
        ids = []
        for new, manifest in inspected:
            row, _ = adapters.add_adapter(
                session,
                _of_model(manifest, rows[0]) if new.on_new_model else manifest,
                name=new.name,
                description=new.description,
                tags=new.tags,
                base_model=rows[0].name if new.on_new_model else new.base_model,
                model_id=rows[0].id if new.on_new_model else new.model_id,
                origin=spec.kind,
                job_id=spec.job_id,
                created_by=job.created_by,
                parents=new.parents,
                source=new.source,
            )
            ids.append(row.id)
        image_ids = [
            images.add_image(
                session, image.facts, stored, job_id=spec.job_id, position=position, created_by=job.created_by
            ).id
            for position, (image, stored) in enumerate(pictures)
        ]
        unused = [] if outcome.also is None else list(outcome.also(session, ids))
        result = {"adapters": ids, "images": image_ids, "report": dict(outcome.report)}
        if rows:
            result["models"] = [row.id for row in rows]
        claims.finish_succeeded(session, spec.job_id, spec.attempt, result)
        previews.drop_preview(session, spec.job_id)
        sealed_inputs.drop(session, spec.job_id)
        left = checkpoints.drop_checkpoint(session, spec.job_id)
    for sha256 in unused if left is None else [left, *unused]:
        forget_blob(context, sha256)
    return result


def _of_model(manifest: AdapterManifest, model: ModelRow) -> AdapterManifest:
    """The adapter as one of that model alone: the same factors for another model that a job made are another one."""
    identity = hashlib.sha256(f"{manifest.identity_digest} {model.identity_digest}".encode()).hexdigest()
    return replace(manifest, identity_digest=identity)


def described(context: JobContext, new: NewModel) -> tuple[BaseModelRef, list[FileEntry]]:
    """What is known of a model that a job made, and its files. Reads every byte of it."""
    ref = inspect_base(new.directory)
    entries = []
    for path in sorted(new.directory.iterdir()):
        context.check_cancelled()
        media_type = "application/json" if path.suffix == ".json" else "application/octet-stream"
        entries.append(FileEntry(path.name, file_sha256(path), path.stat().st_size, media_type))
    assert ref.weights_digest is not None
    return replace(ref, name=new.name, source="files", location=ref.weights_digest, revision=None), entries


def forget_blob(context: JobContext, sha256: str) -> None:
    """Remove a blob that no row names any more, here and in the cache; what fails is left to the sweep."""
    try:
        context.blobs.forget_cached(sha256, Path(context.spec.cache))
        remove_unused(context.database, context.blobs, sha256)
    except (DatabaseUnavailable, BlobStoreUnavailable) as error:
        log.warning("blob_not_removed", sha256=sha256, error=error.detail)
