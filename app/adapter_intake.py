"""From a staged upload to an adapter: understand it, store its bytes, write its row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.auth import Principal
from app.form_fields import form_of, once
from app.idempotency import Answer, answer_after, request_key
from app.schemas.adapters import Adapter, AdapterForm
from app.schemas.common import as_json
from app.state import Services
from app.uploads import Upload, full_disk_as_problem
from artifacts import intake
from artifacts.errors import FieldError, RequestInvalid
from artifacts.manifest import AdapterManifest
from storage import adapters, transferables
from storage.declared_bases import check_declared, declared_base
from workers.adapter_names import name_of_files

TEXT_FIELDS = frozenset({"name", "base_model", "description", "tags"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """An upload whose bytes are stored already."""

    manifest: AdapterManifest
    name: str
    base_name: str | None
    model_id: str | None


def store_upload(services: Services, upload: Upload, principal: Principal, idempotency_key: str | None) -> Answer:
    """Turn a staged upload into an adapter. 201 for a new one, 200 for one that was there.

    Raises:
        RequestInvalid and its kin: a field or a file that is refused; nothing is kept of it.
        BlobStoreUnavailable, DatabaseUnavailable, DiskFull: blobs that were stored already are swept later.
    """
    form = parse_form(upload.fields)
    if not upload.files:
        raise RequestInvalid(
            "The form has no file.",
            hint="Send the adapter in one or more parts named `file`.",
            errors=[FieldError("/file", "is missing")],
        )
    digests = [[file.name, file.sha256] for file in upload.files]
    key = request_key(principal.owner, idempotency_key, "POST /adapters", [as_json(form), digests])

    def act(session: Session, prepared: Prepared) -> Answer:
        return publish(session, prepared, form, principal.key_id)

    return answer_after(services, key, lambda: prepare(services, upload, form), act)


def publish(session: Session, prepared: Prepared, form: AdapterForm, created_by: str | None) -> Answer:
    """The row of an adapter whose bytes are stored: 201 for a new one, 200 for one that was there."""
    row, created = adapters.add_adapter(
        session,
        prepared.manifest,
        name=prepared.name,
        description=form.description,
        tags=form.tags,
        base_model=prepared.base_name,
        model_id=prepared.model_id,
        created_by=created_by,
    )
    shown = as_json(Adapter.of(row, kept=transferables.get(session, row.id)))
    return Answer(201 if created else 200, shown, {"Location": f"/adapters/{row.id}"})


def parse_form(fields: dict[str, list[str]]) -> AdapterForm:
    """The text fields of an upload, checked.

    Raises:
        RequestInvalid: a field given twice (other than `tags`), or a value out of bounds.
    """
    values: dict[str, Any] = {}
    for name, given in fields.items():
        if name == "tags":
            parts = (part.strip() for text in given for part in text.split(","))
            values[name] = list(dict.fromkeys(part for part in parts if part))
        else:
            values[name] = once(name, given)
    return form_of(AdapterForm, values)


def prepare(services: Services, upload: Upload, form: AdapterForm) -> Prepared:
    """Understand a staged upload and store its bytes. Raises as `store_upload`."""
    limits = intake.IntakeLimits(max_bytes=services.settings.max_upload_bytes)
    with services.database.read() as session:
        model, base_name = declared_base(session, form.base_model)
    staged = [(file.name, file.path) for file in upload.files]
    with full_disk_as_problem():
        config = None if model is None else services.base_configs.of_model(model)
        directory = intake.receive(staged, upload.folder / "intake", limits, base_config=config)
    manifest = intake.inspect(directory, base_model=base_name)
    if model is not None:
        check_declared(model, manifest.modules)
    with services.database.write() as session:
        adapters.reserve_blobs(session, manifest.files)
    _store_files(services, directory, manifest, {file.sha256: file.crc32 for file in upload.files})
    return Prepared(
        manifest=manifest,
        name=form.name or name_of_files([file.name for file in upload.files]),
        base_name=base_name,
        model_id=None if model is None else model.id,
    )


def _store_files(services: Services, directory: Path, manifest: AdapterManifest, crc32: dict[str, int]) -> None:
    for entry in manifest.files:
        services.blobs.put_file(directory / entry.path, entry.sha256)
        if entry.sha256 in crc32:
            services.crc32.put(entry.sha256, crc32[entry.sha256])
