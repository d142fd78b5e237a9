"""From a staged upload to an adapter: understand it, store its bytes, write its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy.orm import Session

from app.auth import Principal
from app.base_configs import config_of_model
from app.form_fields import form_of, once
from app.idempotency import Answer, answer_after, request_key
from app.schemas.adapters import Adapter, AdapterForm
from app.schemas.common import as_json
from app.state import Services
from app.uploads import Upload, full_disk_as_problem
from artifacts import base_model, intake
from artifacts.errors import FieldError, RequestInvalid, ShapeMismatch
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME
from artifacts.manifest import AdapterManifest
from storage import adapters, models, transferables
from storage.tables import ModelRow

TEXT_FIELDS = frozenset({"name", "base_model", "description", "tags"})
_STANDARD_NAMES = frozenset({WEIGHTS_NAME, CONFIG_NAME})
_SUFFIXES = (".safetensors", ".gguf", ".zip", ".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True, slots=True)
class _Prepared:
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

    def act(session: Session, prepared: _Prepared) -> Answer:
        row, created = adapters.add_adapter(
            session,
            prepared.manifest,
            name=prepared.name,
            description=form.description,
            tags=form.tags,
            base_model=prepared.base_name,
            model_id=prepared.model_id,
            created_by=principal.key_id,
        )
        location = {"Location": f"/adapters/{row.id}"}
        return Answer(
            201 if created else 200, as_json(Adapter.of(row, kept=transferables.get(session, row.id))), location
        )

    return answer_after(services, key, lambda: _prepare(services, upload, form), act)


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


def default_name(file_names: Sequence[str]) -> str:
    """A name for an upload without one: that of its file, unless PEFT always calls it so."""
    for file_name in file_names:
        base = PurePosixPath(file_name.replace("\\", "/")).name
        if base in _STANDARD_NAMES:
            continue
        suffix = next((item for item in _SUFFIXES if base.lower().endswith(item)), None)
        stem = base[: -len(suffix)] if suffix else ""
        clean = "".join(character for character in stem if character.isprintable()).strip()[:200]
        if clean:
            return clean
    return "adapter"


def _prepare(services: Services, upload: Upload, form: AdapterForm) -> _Prepared:
    limits = intake.IntakeLimits(max_bytes=services.settings.max_upload_bytes)
    model, base_name = _find_model(services, form.base_model)
    staged = [(file.name, file.path) for file in upload.files]
    with full_disk_as_problem():
        config = None if model is None else config_of_model(services, model)
        directory = intake.receive(staged, upload.folder / "intake", limits, base_config=config)
    manifest = intake.inspect(directory, base_model=base_name)
    if model is not None:
        _check_against(model, manifest)
    with services.database.write() as session:
        adapters.reserve_blobs(session, manifest.files)
    _store_files(services, directory, manifest, {file.sha256: file.crc32 for file in upload.files})
    return _Prepared(
        manifest=manifest,
        name=form.name or default_name([file.name for file in upload.files]),
        base_name=base_name,
        model_id=None if model is None else model.id,
    )


def _find_model(services: Services, named: str | None) -> tuple[ModelRow | None, str | None]:
    """The registered base model of that id or name, if there is one, and the name to write down."""
    if named is None:
        return None, None
    with services.database.read() as session:
        model = models.find_model(session, named)
    if model is not None:
        return model, model.location if model.source == "hub" else model.name
    if named.startswith("mdl_"):
        raise RequestInvalid(
            f"There is no base model {named!r}.",
            hint="Register it with POST /models, or give the model's name.",
            errors=[FieldError("/base_model", "unknown id")],
        )
    return None, named


def _check_against(model: ModelRow, manifest: AdapterManifest) -> None:
    """Refuse an adapter that does not fit the base model that the uploader says it is for."""
    fingerprint = models.ref_of(model).fingerprint
    if fingerprint is None:
        return
    offenders = base_model.check_modules(fingerprint, manifest.modules)
    if offenders:
        raise ShapeMismatch(
            f"The adapter does not fit {model.name}: {len(offenders)} of its modules are not there or have other "
            f"dimensions, for instance {offenders[0]}.",
            hint="Name the base model that the adapter was trained on.",
            errors=[FieldError("/base_model", text) for text in offenders[:20]],
        )


def _store_files(services: Services, directory: Path, manifest: AdapterManifest, crc32: dict[str, int]) -> None:
    for entry in manifest.files:
        services.blobs.put_file(directory / entry.path, entry.sha256)
        if entry.sha256 in crc32:
            services.crc32.put(entry.sha256, crc32[entry.sha256])
