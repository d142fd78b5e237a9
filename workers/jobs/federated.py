"""The job kind "train" of a federated run: what the server does between the rounds.

Each attempt takes up the run where its checkpoint has it, does what can be done, and ends in a pause while the clients
are at work (`storage.federations`). The clients' jobs are `workers.jobs.client_update`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from safetensors.torch import load_file
from sqlalchemy.orm import Session
from torch import Tensor

from artifacts.errors import DatabaseUnavailable, FileBroken, RequestInvalid
from artifacts.safetensors_header import read_header
from storage import federations
from storage.federations import Asked
from storage.job_metrics import Point, record_metrics
from storage.tables import ClientUpdateRow
from train.base_files import BaseFiles
from train.data import DataFile
from train.engine import Plan
from train.federation.averaging import average, shares
from train.federation.run import Federation, advanced
from train.federation.state import LISTED, TENSORS, RunState
from train.federation.updates import check_update
from train.options.ffa_lora import FfaLoraOptions
from workers.checkpointing import Checkpoints
from workers.context import JobContext, JobOutcome
from workers.jobs.target_engine import for_engine
from workers.jobs.train_plans import described, trained_adapter
from workers.pauses import JobPause

BEGUN, DONE = 0.05, 0.9
"""Where the rounds begin and end on the progress bar."""
STATE = "state"

log = structlog.get_logger(__name__)


def run(context: JobContext, plan: Plan) -> JobOutcome | JobPause:
    """Do what comes next in the run; a pause while clients are waited for.

    Raises:
        NotFound: the base model or the server's dataset is not there any more.
        RequestInvalid and its kin: see `train.federation.run`; or the run can not go on without a client.
        AttemptCancelled, AttemptStale
    """
    return _Server(context, plan).run()


def file_of(context: JobContext, dataset_id: str) -> DataFile:
    """A dataset's file. Raises: as `JobContext.dataset`."""
    stored, path = context.dataset(dataset_id)
    return DataFile(path, stored.format)


class _Server:
    """The server of a run, in one attempt."""

    def __init__(self, context: JobContext, plan: Plan) -> None:
        assert isinstance(plan.options, FfaLoraOptions)
        self.context, self.plan, self.options = context, plan, plan.options
        self.clients = self.options.clients or []
        self.checkpoints = Checkpoints(context)
        self.model, source = context.model_source(context.params["base_model"])
        base = BaseFiles(self.model.name, source.location, source.revision)
        self.federation = Federation(plan, base, context.scratch)

    def run(self) -> JobOutcome | JobPause:
        resumed = self.checkpoints.fetch()
        state = self._begin() if resumed is None else RunState.load(resumed[0])
        while state.round < self.options.rounds and state.stopped is None:
            rows = self._updates(state.round)
            if not rows or any(row.state == "pending" for row in rows):
                return self._ask(state)
            state = self._close(state, rows)
        return self._finish(state)

    def _begin(self) -> RunState:
        self.context.progress(0.0, "looking at the clients' rows")
        datasets = [client.dataset for client in self.clients]
        files = [None if dataset is None else file_of(self.context, dataset) for dataset in datasets]
        state = self.federation.begin(file_of(self.context, self.context.params["dataset"]), files)
        self._keep(state)
        return state

    def _keep(self, state: RunState) -> None:
        folder = self.context.scratch / f"{STATE}-{state.round}"
        state.save(folder)
        if not self.checkpoints.publish(folder, state.round):
            # A later round must not begin from what is nowhere.
            raise DatabaseUnavailable(f"The state after round {state.round} could not be kept.")

    def _updates(self, round_: int) -> list[ClientUpdateRow]:
        with self.context.database.read() as session:
            return federations.updates_of(session, self.context.spec.job_id, round_)

    def _ask(self, state: RunState) -> JobPause:
        """Have every client do its steps of the next round."""
        run_id, params = self.context.spec.job_id, self.context.params
        shared = {name: params.get(name) for name in ("method", "base_model", "task", "parameters", "training", "seed")}
        asked = [
            Asked(
                number,
                None
                if client.dataset is None
                else {"run": run_id, "round": state.round, "client": number, "dataset": client.dataset, **shared},
            )
            for number, client in enumerate(self.clients)
        ]

        def open_(session: Session) -> None:
            federations.open_round(
                session,
                run_id,
                state.round,
                asked,
                seconds=self.options.round_seconds,
                affinity=self.model.id,
            )

        message = f"round {state.round + 1} of {self.options.rounds}: the clients are at work{self._spent(state)}"
        return JobPause(open_, message, self._fraction(state))

    def _fraction(self, state: RunState) -> float:
        return BEGUN + (DONE - BEGUN) * state.round / self.options.rounds

    def _spent(self, state: RunState) -> str:
        spent = self.federation.epsilons(state)
        return "" if self.options.privacy is None else f"; ε = {max(spent):.4g} of {self.options.privacy.epsilon:g}"

    def _close(self, state: RunState, rows: list[ClientUpdateRow]) -> RunState:
        """Average what the clients of the round gave."""
        usable: dict[int, dict[str, Tensor]] = {}
        norms: dict[int, float] = {}
        refused: dict[int, str] = {}
        before = self.context.scratch / f"before-{state.round}"
        state.save(before)
        start = before / TENSORS
        trained = {name: info for name, info in read_header(start).tensors.items() if self.options.trains(name)}
        for row in rows:
            if row.state not in ("answered", "refused"):
                continue
            try:
                path = self._given(row)
                norms[row.client] = check_update(path, start, trained, self.options.max_update_norm)
                usable[row.client] = load_file(path)
            except FileBroken as error:
                refused[row.client] = error.detail
        spec = self.context.spec
        if refused:
            with self.context.database.write() as session:
                federations.record_refusals(session, spec.job_id, spec.attempt, state.round, refused)
        absent = [self._absence(row, refused) for row in rows if row.client not in usable]
        self._check_enough(state.round, usable, absent)
        details = {row.client: row.details for row in rows if row.client in usable}
        counts = {client: int(found["rows"]) for client, found in details.items()}
        weights = shares(counts, self.options.weighting)
        after = advanced(
            state.with_rows(counts),
            average(usable, weights),
            seconds=state.seconds + sum(float(found["seconds"]) for found in details.values()),
            absent=state.absent + len(absent),
            absences=(*state.absences, *absent)[:LISTED],
        )
        losses = {client: found["loss"] for client, found in details.items() if found["loss"] is not None}
        if losses:
            told = sum(weights[client] for client in losses)
            after = replace(after, final_loss=sum(weights[client] * loss for client, loss in losses.items()) / told)
        if self.options.privacy is not None:
            # What was refused or late may have left its client all the same; what is lost has not.
            noisy = {row.client: self.options.local_steps for row in rows if row.state != "lost"}
            after = after.with_private_steps(noisy)
            if after.round < self.options.rounds:
                after = replace(after, stopped=after.budget_problem(self.options))
        self._keep(after)
        self._record(after, norms)
        return after

    def _given(self, row: ClientUpdateRow) -> Path:
        """The file that a client gave."""
        assert row.sha256 is not None
        path: Path = self.context.scratch / "given" / f"{row.round}-{row.client}.safetensors"
        self.context.fetch(row.sha256, path)
        return path

    def _absence(self, row: ClientUpdateRow, refused: dict[int, str]) -> dict[str, Any]:
        state = "refused" if row.client in refused else row.state
        return {
            "round": row.round + 1,
            "client": row.client,
            "state": state,
            "reason": refused.get(row.client, row.reason),
        }

    def _check_enough(self, round_: int, usable: dict[int, Any], absent: list[dict[str, Any]]) -> None:
        """Raises RequestInvalid: the options do not let the run go on with those that are left."""
        if not absent:
            return
        first = absent[0]
        told = f"Client {first['client']} was {first['state']} in round {round_ + 1}: {first['reason']}"
        if self.options.absent == "fail":
            raise RequestInvalid(
                told,
                hint="parameters.absent=skip goes on without a client that gives nothing usable in a round. A retry "
                "of this job goes on from the last round.",
            )
        if len(usable) < self.options.min_clients:
            raise RequestInvalid(
                f"{len(usable)} clients answered in round {round_ + 1}; min_clients is {self.options.min_clients}. "
                f"{told}",
                hint="A retry of this job goes on from the last round.",
            )

    def _record(self, state: RunState, norms: dict[int, float]) -> None:
        """The numbers of the round: the series, and ε beside what the clients gave."""
        numbers = {"clients": float(len(norms)), "update_norm": max(norms.values())}
        if self.options.privacy is None and state.final_loss is not None:
            numbers["loss"] = state.final_loss
        epsilons = self.federation.epsilons(state)
        if epsilons:
            numbers["epsilon"] = max(epsilons)
        spec = self.context.spec
        with self.context.database.write() as session:
            record_metrics(session, spec.job_id, spec.attempt, [Point(state.round, numbers)])
            federations.record_epsilons(session, spec.job_id, state.round - 1, dict(enumerate(epsilons)))

    def _finish(self, state: RunState) -> JobOutcome:
        self.context.progress(DONE, "loading the adapter onto a fresh base model")
        output: Path = self.context.scratch / "trained"
        server = file_of(self.context, self.context.params["dataset"])
        report = self.federation.finish(state, server, output).to_dict() | described(self.plan)
        output, told = for_engine(self.context, output)
        report |= told
        names = f"{len(self.clients)} client{'s' if len(self.clients) > 1 else ''}"
        trained = trained_adapter(self.context, self.plan, output, names, self.model, report["steps"])

        def also(session: Session, ids: Any) -> list[str]:
            del ids
            federations.forget_given(session, self.context.spec.job_id)
            return []

        return JobOutcome((trained,), report, also=also)
