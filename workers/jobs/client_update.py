"""The job kind "client_update": the steps of one client in one round of a federated training."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import save_file
from sqlalchemy.orm import Session

from artifacts.content import file_sha256
from artifacts.errors import StateConflict
from artifacts.manifest import FileEntry
from storage import federations
from storage.checkpoints import newest_checkpoint
from train.base_files import BaseFiles
from train.checkpoints import unpack
from train.federation.run import Federation
from train.federation.state import RunState
from workers.context import JobContext, JobOutcome
from workers.jobs.federated import file_of
from workers.jobs.train_plans import plan_of


def run(context: JobContext) -> JobOutcome:
    """Train the common adapter of the round on the client's rows, and give back what was trained.

    `params`: {run, round, client, dataset}, and of the training {method, base_model, task, parameters, training, seed}.
    An attempt that is interrupted leaves nothing: the next one begins the round's steps anew.

    Raises:
        StateConflict: the round is over.
        NotFound: the base model or the dataset is not there any more.
        RequestInvalid and its kin, AttemptCancelled, AttemptStale
    """
    params, plan = context.params, plan_of(context)
    run_id, round_, client = params["run"], params["round"], params["client"]
    context.progress(0.0, f"fetching the adapter of round {round_ + 1}")
    state = _state(context, run_id, round_)
    model, source = context.model_source(params["base_model"])
    federation = Federation(plan, BaseFiles(model.name, source.location, source.revision), context.scratch)
    context.progress(0.1, f"training client {client} in round {round_ + 1}")
    update = federation.update(state, client, file_of(context, params["dataset"]), context.check_cancelled)
    path = context.scratch / "update.safetensors"
    save_file(dict(update.tensors), path, metadata={"format": "pt"})
    entry = FileEntry(path.name, file_sha256(path), path.stat().st_size, "application/octet-stream")
    report = {"rows": update.rows, "seconds": round(update.seconds, 3), "loss": update.loss, "bytes": entry.size}

    def also(session: Session, ids: Sequence[str]) -> list[str]:
        del ids
        federations.answer(session, run_id, round_, client, entry, report)
        return []

    return JobOutcome(report=report, files=((entry, path),), also=also)


def _state(context: JobContext, run_id: str, round_: int) -> RunState:
    """The run as it is before the round. Raises StateConflict: it is further, or at an end."""
    with context.database.read() as session:
        row = newest_checkpoint(session, run_id)
    if row is None or row.step != round_:
        raise StateConflict(f"round {round_ + 1} of {run_id} is over; nobody waits for this client any more")
    archive = context.scratch / "run.tar"
    context.fetch(row.sha256, archive)
    return RunState.load(unpack(archive, context.scratch / "run"))
