"""The end of an upload that came in pieces: put together, compared with its digest, and made an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy.orm import Session

from app.adapter_intake import prepare, publish
from app.auth import Principal
from app.idempotency import Answer
from app.schemas.adapters import Adapter, AdapterForm
from app.schemas.common import as_json
from app.state import Services
from app.upload_segments import drop_blobs, find_upload, lifetime_of
from app.uploads import StagedFile, Upload, UploadedFile, make_folder
from artifacts.errors import BlobCorrupt, BlobMissing, FieldError, FileBroken, MalformedRequest, RankwiseError
from storage import adapters, transferables, uploads
from storage.tables import UploadRow

_FINAL = frozenset({413, 415, 422})
"""Statuses of errors that the same bytes would get again."""


def complete(services: Services, principal: Principal, upload_id: str) -> Answer:
    """Make the adapter, as `POST /adapters` does. Once it is made, the same answer again.

    Raises:
        NotFound, StateConflict: there is no such upload of this key, or it has failed.
        MalformedRequest: bytes are missing.
        FileBroken and other errors of intake: the upload has failed.
        BlobMissing, BlobCorrupt: the store has lost some of its bytes, and the upload has failed.
        QuotaExceeded, BlobStoreUnavailable, DatabaseUnavailable, DiskFull: it can be completed later.
    """
    outcome = "refused"
    try:
        answer = _complete(services, principal, upload_id)
        outcome = "created" if answer.status == 201 else "known"
    except RankwiseError as error:
        outcome = error.code
        raise
    finally:
        services.metrics.uploads.labels(outcome).inc()
    return answer


def _complete(services: Services, principal: Principal, upload_id: str) -> Answer:
    row = find_upload(services, principal, upload_id)
    if row.state == "done":
        return _again(services, row)
    uploads.check_open(row)
    if row.received != row.length:
        raise MalformedRequest(
            f"The upload {row.id} is to end with {row.received} bytes; {row.length} were announced.",
            hint="Leave Upload-Complete out, or ?0, until the last bytes are sent.",
            errors=[FieldError("/header/Upload-Complete", f"{row.length - row.received} bytes are missing")],
        )
    with services.database.write() as session:
        uploads.touch(session, _locked(session, principal, upload_id), lifetime_of(services))
    folder = make_folder(services.staging)
    answer, digests = None, list[str]()
    try:
        form = AdapterForm.model_validate(row.form)
        try:
            file = _assembled(services, row, folder)
        except (BlobMissing, BlobCorrupt) as error:
            found = find_upload(services, principal, upload_id)
            if found.state == "done":  # another request has completed it meanwhile, and took the segments away
                return _again(services, found)
            uploads.check_open(found)
            lost = type(error)(f"bytes that had come are lost: {error.detail}", hint="Begin a new upload.")
            _fail(services, principal, upload_id, lost)
            raise lost from error
        prepared = prepare(services, Upload(folder, files=[file]), form)
        with services.database.write() as session:
            locked = _locked(session, principal, upload_id)
            if locked.state != "done":
                uploads.check_open(locked)
                # First the blobs, then the key, as in every other transaction: else two could wait for each other.
                adapters.reserve_blobs(session, prepared.manifest.files)
                uploads.release(session, locked)  # what the adapter stores is charged instead
                answer = publish(session, prepared, form, locked.created_by)
                digests = list(uploads.finish(session, locked, answer.body["id"]))
    except RankwiseError as error:
        if error.status in _FINAL:
            _fail(services, principal, upload_id, error)
        raise
    finally:
        shutil.rmtree(folder)
    if answer is None:
        return _again(services, locked)
    drop_blobs(services, digests)
    return answer


def cancel(services: Services, principal: Principal, upload_id: str) -> None:
    """Forget an upload and its bytes. Raises NotFound."""
    with services.database.write() as session:
        digests = uploads.remove(session, _locked(session, principal, upload_id))
    drop_blobs(services, digests)


def _locked(session: Session, principal: Principal, upload_id: str) -> UploadRow:
    everyones = "admin" in principal.scopes
    return uploads.get_upload(session, upload_id, owner=principal.key_id, everyones=everyones, lock=True)


def _assembled(services: Services, row: UploadRow, folder: Path) -> UploadedFile:
    """The whole file, from its segments.

    Raises:
        FileBroken: it has another digest than was announced.
        BlobMissing, BlobCorrupt, BlobStoreUnavailable, DiskFull
    """
    with services.database.read() as session:
        segments = uploads.segments_of(session, row.id)
    file = StagedFile(row.file_name, folder / "part-0000")
    try:
        for segment in segments:
            for chunk in services.blobs.stream(segment.sha256):
                file.write(chunk)
    finally:
        file.close()
    found = file.result()
    if found.sha256 != row.sha256:
        problem = f"the bytes that came have the SHA-256 {found.sha256}, not {row.sha256}"
        raise FileBroken(
            f"T{problem[1:]}.",
            hint="The file has changed while it was sent, or was read wrongly: begin a new upload.",
            errors=[FieldError("/sha256", problem)],
        )
    return found


def _again(services: Services, row: UploadRow) -> Answer:
    """The adapter that the upload has become. Raises NotFound: it was deleted since."""
    assert row.adapter_id is not None
    with services.database.read() as session:
        found = adapters.get_adapter(session, row.adapter_id)
        shown = as_json(Adapter.of(found, kept=transferables.get(session, found.id)))
    return Answer(200, shown, {"Location": f"/adapters/{found.id}"})


def _fail(services: Services, principal: Principal, upload_id: str, error: RankwiseError) -> None:
    with services.database.write() as session:
        row = _locked(session, principal, upload_id)
        if row.state != "open":
            return
        digests = uploads.fail(session, row, error.code, error.detail)
    drop_blobs(services, digests)
