"""From a staged upload to a dataset: validate every row, store the file, write its row of the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from sqlalchemy.orm import Session

from app.auth import Principal
from app.form_fields import form_of, once
from app.idempotency import Answer, answer_after, request_key
from app.schemas.common import as_json
from app.schemas.datasets import Dataset, DatasetForm
from app.state import Services
from app.uploads import Upload, UploadedFile
from artifacts.errors import FieldError, RequestInvalid
from storage import datasets
from storage.blob_rows import reserve_blobs
from train.inspection import inspect_apart
from train.rows import DatasetInfo, Format, Limits, find_format, inspect
from train.text_lines import GZIP_MAGIC

TEXT_FIELDS = frozenset({"name", "format"})
SMALL_BYTES = 1024**2
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".zip", ".fasta", ".fna", ".fa")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A file that is valid and stored."""

    format: Format
    info: DatasetInfo


def store_upload(services: Services, upload: Upload, principal: Principal, idempotency_key: str | None) -> Answer:
    """Turn a staged upload into a dataset. 201 for a new one, 200 for one that was there.

    Raises:
        RequestInvalid and its kin, TooLarge: a field, the file or rows of it are refused; nothing is kept of it.
        BlobStoreUnavailable, DatabaseUnavailable, DiskFull: a blob that was stored already is swept later.
    """
    form = form_of(DatasetForm, {name: once(name, given) for name, given in upload.fields.items()})
    file = _only_file(upload)
    payload = [as_json(form), file.name, file.sha256]
    key = request_key(principal.owner, idempotency_key, "POST /datasets", payload)

    def act(session: Session, prepared: _Prepared) -> Answer:
        row, created = datasets.add_dataset(
            session,
            name=form.name or default_name(file.name),
            format=prepared.format,
            sha256=file.sha256,
            size=file.size,
            rows=prepared.info.rows,
            columns=[asdict(column) for column in prepared.info.columns],
            tasks=[asdict(task) for task in prepared.info.tasks],
            warnings=prepared.info.problems,
            created_by=principal.key_id,
        )
        return Answer(201 if created else 200, as_json(Dataset.of(row)), {"Location": f"/datasets/{row.id}"})

    return answer_after(services, key, lambda: _prepare(services, file, form), act)


def _only_file(upload: Upload) -> UploadedFile:
    if len(upload.files) != 1:
        fault = "is missing" if not upload.files else f"is given {len(upload.files)} times; a dataset is one file"
        raise RequestInvalid(
            f"The part `file` {fault}.",
            hint="Send the dataset in one part named `file`.",
            errors=[FieldError("/file", fault)],
        )
    return upload.files[0]


def default_name(file_name: str) -> str:
    """A name for an upload without one: that of its file, without what says how it is packed."""
    name = PurePosixPath(file_name.replace("\\", "/")).name
    name = name[: -len(".gz")] if name.lower().endswith(".gz") else name
    suffix = next((item for item in _SUFFIXES if name.lower().endswith(item)), "")
    stem = name[: len(name) - len(suffix)]
    return "".join(character for character in stem if character.isprintable()).strip()[:200] or "dataset"


def _is_small_text(file: UploadedFile, found: Format) -> bool:
    """Whether the file is read so soon, and so safely, that a process of its own is not worth the wait."""
    if found in ("parquet", "images") or file.size > SMALL_BYTES:
        return False
    with file.path.open("rb") as stream:
        return stream.read(2) != GZIP_MAGIC


def _prepare(services: Services, file: UploadedFile, form: DatasetForm) -> _Prepared:
    found = find_format(file.path, file.name, form.format)
    limits = Limits(max_bytes=services.settings.max_upload_bytes)
    read = inspect if _is_small_text(file, found) else inspect_apart
    info = read(file.path, found, limits)
    with services.database.write() as session:
        reserve_blobs(session, [datasets.file_entry(file.sha256, file.size)])
    services.blobs.put_file(file.path, file.sha256)
    return _Prepared(found, info)
