"""Federated clients on machines of their own: who may speak for one, what it is told, and what it gives."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.auth import Principal
from app.form_fields import form_of, once
from app.idempotency import Answer
from app.schemas.common import as_json
from app.schemas.remote_clients import GivenUpdate, RemoteBase, RemoteTask, UpdateForm, WantedUpdate
from app.state import Services
from app.uploads import Upload, UploadedFile
from artifacts.errors import FieldError, NotFound, RankwiseError, RequestInvalid, StateConflict, TooLarge
from artifacts.layout import WEIGHTS_NAME
from artifacts.manifest import FileEntry
from artifacts.menu import accepted_parameters
from artifacts.safetensors_header import TensorInfo, parse_header
from storage import models, remote_clients
from storage.blob_reader import open_blob
from storage.blob_rows import reserve_blobs
from storage.blobs import BlobStore
from storage.downloads import SAFETENSORS_TYPE, Download
from storage.segments import BlobSlice, read_segments
from storage.tables import TERMINAL_STATES, ClientUpdateRow, JobRow
from train.catalog import parse_parameters
from train.federation.updates import check_update, upload_limit
from train.options.ffa_lora import FfaLoraOptions, Remote
from train.settings import TrainingSettings

TEXT_FIELDS = frozenset({"rows", "seconds", "loss"})
FORM_BYTES = 1024**2
"""What the form around the file may add."""


@dataclass(frozen=True, slots=True)
class RemoteClient:
    """A remote client of a training, whom the caller may speak for."""

    run_id: str
    number: int
    remote: Remote
    options: FfaLoraOptions
    params: dict[str, Any]

    @property
    def batch_size(self) -> int:
        return TrainingSettings.model_validate(self.params.get("training") or {}).batch_size


@dataclass(frozen=True, slots=True)
class Start:
    """The common adapter of a round: where its file lies, and those of its tensors that clients train."""

    file: BlobSlice
    trained: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Expected:
    """What may come for a round. `start` is None when the client has answered: only the same may come again."""

    client: RemoteClient
    round: int
    start: Start | None
    limit: int


def find_client(session: Session, principal: Principal, run_id: str, number: int) -> RemoteClient:
    """The remote client, if the caller's key speaks for it.

    Raises:
        NotFound: it does not, or there is no such client; which of them is not told.
    """
    run = session.get(JobRow, run_id)
    if run is not None and run.kind == "train":
        with accepted_parameters():
            options = parse_parameters(run.params["method"], run.params.get("parameters") or {})
        remote = options.remotes.get(number) if isinstance(options, FfaLoraOptions) else None
        if remote is not None and _may_speak(principal, remote):
            assert isinstance(options, FfaLoraOptions)
            return RemoteClient(run_id, number, remote, options, run.params)
    raise NotFound(
        f"There is no remote client {number} of {run_id} that this key speaks for.",
        hint="parameters.clients of the training names the key of each remote client.",
    )


def _may_speak(principal: Principal, remote: Remote) -> bool:
    return "admin" in principal.scopes or (principal.key_id is not None and principal.key_id == remote.key)


def describe(services: Services, principal: Principal, run_id: str, number: int) -> RemoteTask:
    """What the client is asked for at this moment."""
    with services.database.read() as session:
        client = find_client(session, principal, run_id, number)
        run = session.get_one(JobRow, run_id)
        base = RemoteBase.of(models.get_model(session, client.params["base_model"]))
        part = remote_clients.newest_part(session, run_id, number)
        state = "over" if run.state in TERMINAL_STATES else _state(part)
        sha256 = None
        if part is not None and state == "asked":
            sha256 = remote_clients.start_of(session, run_id, part.round).sha256
    start = None if sha256 is None else _start(services.blobs, sha256, client.options)
    wanted = None
    if part is not None and start is not None:
        path = f"/jobs/{run_id}/clients/{number}/rounds/{part.round + 1}"
        wanted = WantedUpdate(
            adapter=f"{path}/adapter",
            update=f"{path}/update",
            tensors=WantedUpdate.tensors_of(start.trained),
            max_bytes=upload_limit(start.trained),
            min_rows=client.batch_size,
            max_rows=client.remote.max_rows,
            max_norm=client.options.max_update_norm,
        )
    return RemoteTask.model_validate(
        {
            "job_id": run_id,
            "client": number,
            "name": client.remote.name,
            "training_state": run.state,
            "state": state,
            "reason": None if part is None else part.reason,
            "round": None if part is None else part.round + 1,
            "deadline": None if part is None else part.deadline,
            "base_model": base,
            "method": client.params["method"],
            "task": client.params.get("task"),
            "parameters": _parameters(client),
            "training": client.params.get("training") or {},
            "seed": client.params.get("seed") or 0,
            "wanted": wanted,
            "given": None if part is None or "sha256" not in part.details else GivenUpdate.of(part),
        }
    )


def _state(part: ClientUpdateRow | None) -> str:
    if part is None:
        return "waiting"
    return "asked" if part.state == "pending" else part.state


def _parameters(client: RemoteClient) -> dict[str, Any]:
    """The method's parameters; of the other clients not even the names."""
    own = client.remote.model_dump(mode="json", include={"name", "max_rows"})
    found: dict[str, Any] = client.options.model_dump(mode="json")
    found["clients"] = [
        {"remote": own if number == client.number else {"name": _mask(number, client.remote.name)}}
        for number in range(len(client.options.clients or ()))
    ]
    return found


def _mask(number: int, own: str) -> str:
    """What another client is called: no two clients have one name, so it is not the own one either."""
    mask = f"client-{number}"
    return mask if mask != own else f"other-{number}"


def adapter_file(services: Services, principal: Principal, run_id: str, number: int, round_: int) -> Download:
    """The common adapter that the round begins with, while it is open."""
    with services.database.read() as session:
        client = find_client(session, principal, run_id, number)
        remote_clients.find_part(session, run_id, round_, number)
        sha256 = remote_clients.start_of(session, run_id, round_).sha256
    file = _start(services.blobs, sha256, client.options).file
    return Download((file,), f'"{file.sha256}-{file.start}"', SAFETENSORS_TYPE, WEIGHTS_NAME)


def _start(blobs: BlobStore, sha256: str, options: FfaLoraOptions) -> Start:
    """The adapter inside of the training's checkpoint."""
    with open_blob(blobs, sha256) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        member = archive.getmember(WEIGHTS_NAME)
        begin, end = member.offset_data, member.offset_data + member.size
        file.seek(begin)
        header = parse_header(file, member.size, name=WEIGHTS_NAME)
    trained = {name: info for name, info in header.tensors.items() if options.trains(name)}
    return Start(BlobSlice(sha256, begin, end), trained)


def expect(services: Services, principal: Principal, run_id: str, number: int, round_: int) -> Expected:
    """What may come for a round, before a byte of it is read.

    Raises:
        NotFound: no such client, or it was not asked in this round.
        Gone, StateConflict: nothing may come any more.
    """
    with services.database.read() as session:
        client = find_client(session, principal, run_id, number)
        part = remote_clients.find_part(session, run_id, round_, number)
        if part.state == "answered":
            return Expected(client, round_, None, int(part.details["bytes"]))
        remote_clients.check_open(session, part)
        sha256 = remote_clients.start_of(session, run_id, round_).sha256
    start = _start(services.blobs, sha256, client.options)
    return Expected(client, round_, start, upload_limit(start.trained))


async def watched(chunks: AsyncIterator[bytes], expected: Expected) -> AsyncIterator[bytes]:
    """The chunks of the body, up to the size that the round allows.

    Raises:
        TooLarge; StateConflict: the client has answered, and this is longer than what it gave.
    """
    left = expected.limit + FORM_BYTES
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise _too_large(expected)
        yield chunk


def _too_large(expected: Expected) -> RankwiseError:
    if expected.start is None:
        return StateConflict(
            f"Client {expected.client.number} has given other bytes in round {expected.round + 1} already."
        )
    problem = f"has more than {expected.limit} bytes, the most that the tensors of the round take"
    return TooLarge(f"The file {problem}.", errors=[FieldError("/file", problem)])


def store_update(expected: Expected) -> Callable[[Services, Upload, Principal, str | None], Answer]:
    """Takes the staged update of a round. 201 when it is new, 200 when it was given before.

    Raises:
        RequestInvalid and its kin, TooLarge: a field or the file is refused; nothing is kept of it.
        Gone, StateConflict: nothing may come any more, or other bytes were given before.
    """

    def store(services: Services, upload: Upload, principal: Principal, idempotency_key: str | None) -> Answer:
        del principal, idempotency_key
        client, round_ = expected.client, expected.round
        form = form_of(UpdateForm, {name: once(name, given) for name, given in upload.fields.items()})
        _check_rows(client, form.rows)
        file = _only_file(upload, expected)
        with services.database.read() as session:
            part = remote_clients.find_part(session, client.run_id, round_, client.number)
            if remote_clients.is_same(part, file.sha256, form.rows):
                return Answer(200, as_json(GivenUpdate.of(part)))
            remote_clients.check_open(session, part)
        assert expected.start is not None
        norm = _checked(services, upload, file, expected.start, client.options.max_update_norm)
        entry = FileEntry("update.safetensors", file.sha256, file.size, SAFETENSORS_TYPE)
        with services.database.write() as session:
            reserve_blobs(session, [entry])
        services.blobs.put_file(file.path, file.sha256)
        details = as_json(form) | {"bytes": file.size, "sha256": file.sha256, "norm": norm}
        with services.database.write() as session:
            row, created = remote_clients.give(session, client.run_id, round_, client.number, entry, details)
            return Answer(201 if created else 200, as_json(GivenUpdate.of(row)))

    return store


def _check_rows(client: RemoteClient, rows: int) -> None:
    problems = client.options.row_problems(rows, client.batch_size, "/rows", client.number)
    if problems:
        raise RequestInvalid(f"{problems[0].pointer} {problems[0].message}.", errors=problems)


def _only_file(upload: Upload, expected: Expected) -> UploadedFile:
    if len(upload.files) != 1:
        fault = "is missing" if not upload.files else f"is given {len(upload.files)} times"
        raise RequestInvalid(
            f"The part `file` {fault}.",
            hint="Send the trained tensors as one safetensors file in the part named `file`.",
            errors=[FieldError("/file", fault)],
        )
    if upload.files[0].size > expected.limit:
        raise _too_large(expected)
    return upload.files[0]


def _checked(services: Services, upload: Upload, file: UploadedFile, start: Start, max_norm: float | None) -> float:
    """How far the update is from the round's start."""
    before: Path = upload.folder / "start.safetensors"
    with before.open("wb") as target:
        for chunk in read_segments(services.blobs, (start.file,), 0, len(start.file)):
            target.write(chunk)
    return check_update(file.path, before, start.trained, max_norm)
