"""Federated trainings, as the server sees them: what is refused when one is submitted, and the rounds that go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.orm import Session

from app.dataset_choice import check_suitable
from app.stored_inputs import stored_dataset
from artifacts.errors import FieldError, NotFound, RequestInvalid
from storage import federations, keys
from storage.database import Database
from train.catalog import parse_parameters
from train.options.ffa_lora import FfaLoraOptions, Remote

if TYPE_CHECKING:
    from app.schemas.train import TrainParams

_log = structlog.stdlib.get_logger(__name__)


def check_federation(session: Session, request: TrainParams, devices: int) -> None:
    """Refuse a federated training whose clients do not fit; any other training passes.

    Raises:
        RequestInvalid: a client's dataset is not there, can not serve the task, has too few rows, or is the server's;
            or a remote client's key can not speak for it; or the request asks for what a federated training has not.
        StateConflict: a dataset is about to be dropped.
    """
    options = parse_parameters(request.method, request.parameters)
    if not isinstance(options, FfaLoraOptions) or options.clients is None:
        return
    problems = []
    for number, client in enumerate(options.clients):
        if client.dataset is not None:
            problems += _dataset_problems(session, request, options, number, client.dataset)
    for number, remote in options.remotes.items():
        problems += _remote_problems(session, request, f"/parameters/clients/{number}/remote", remote)
    if devices != 1:
        problems.append(FieldError("/resources/devices", "a client trains on one device; several clients take several"))
    if request.evaluation.group_column is not None:
        problems.append(FieldError("/evaluation/group_column", "a federated training tells no figures of groups"))
    if request.continue_from is not None:
        problems.append(FieldError("/continue_from", "a federated training begins with lora_A from its seed"))
    if request.transferable is not None:
        problems.append(FieldError("/transferable", "goes with a training on one dataset"))
    if problems:
        first = problems[0]
        raise RequestInvalid(f"{first.pointer} {first.message}.", errors=problems)


def _dataset_problems(
    session: Session, request: TrainParams, options: FfaLoraOptions, number: int, dataset_id: str
) -> list[FieldError]:
    pointer = f"/parameters/clients/{number}/dataset"
    if dataset_id == request.dataset:
        return [FieldError(pointer, "is the server's dataset, which is measured on and never trained on: give another")]
    dataset = stored_dataset(session, dataset_id, pointer)
    check_suitable(dataset, request.full_task, pointer)
    return options.row_problems(dataset.rows, request.training.batch_size, pointer, number)


def _remote_problems(session: Session, request: TrainParams, pointer: str, remote: Remote) -> Iterator[FieldError]:
    if remote.key is not None and (problem := _key_problem(session, remote.key)) is not None:
        yield FieldError(f"{pointer}/key", problem)
    if remote.max_rows < request.training.batch_size:
        size = request.training.batch_size
        yield FieldError(f"{pointer}/max_rows", f"is below training.batch_size, {size}: nothing could be taken")


def _key_problem(session: Session, key_id: str) -> str | None:
    """Why nobody could speak for a client with this key."""
    try:
        row = keys.get_live_key(session, key_id)
    except NotFound as error:
        return f"can not be used: {error.detail}"
    if not {"client", "admin"} & set(row.scopes):
        return f"has not the scope client; it has {', '.join(row.scopes)}"
    return None


def settle_federations(database: Database) -> None:
    """Mark the clients that will give nothing, cancel those that nobody waits for, and wake the trainings that wait.

    Raises:
        DatabaseUnavailable, DiskFull: the rest is still due.
    """
    with database.read() as session:
        waiting = federations.unsettled(session)
    for run_id in waiting:
        with database.write() as session:
            stopped = federations.settle(session, run_id)
        for job_id in stopped:
            with database.write() as session:
                federations.stop_client(session, job_id)
            _log.info("client_stopped", run=run_id, job=job_id)
