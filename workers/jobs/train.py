"""The job kind "train": fetch the data and the checkpoint, train, hand over the adapter with its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from artifacts.errors import DatabaseUnavailable
from storage.adapters import Parent
from storage.job_metrics import Point, record_metrics
from train.base_files import BaseFiles
from train.catalog import find_method
from train.continuation import ContinueFrom, Start, check_base, continued_options
from train.data import DataFile
from train.engine import BEFORE, LOOP, Inputs, Plan, train_adapter
from train.packed_base import fitted
from train.protocol import Beside
from workers.checkpointing import Checkpoints
from workers.context import JobContext, JobOutcome, NewModel, StoredModel
from workers.jobs import federated
from workers.jobs.target_engine import for_engine
from workers.jobs.train_plans import default_name, described, plan_of, trained_adapter
from workers.pauses import JobPause
from workers.stage_zero import ADAPTER_SHARE, TransferableTraining

SECONDS_BETWEEN = 1.0
LONGEST_BETWEEN = 30.0
POINTS_AT_ONCE = 500

log = structlog.get_logger(__name__)


def run(context: JobContext) -> JobOutcome | JobPause:
    """Train the adapter that the job's parameters describe.

    `params`: {method, base_model, dataset, task, parameters, training, evaluation, seed, name, continue_from,
    transferable, target_engine}.

    Raises:
        NotFound: the base model or the dataset is not there any more.
        RequestInvalid and its kin: they do not fit the job (`train.engine.train_adapter`,
            `workers.stage_zero.TransferableTraining`).
        AttemptCancelled, AttemptStale
    """
    plan = plan_of(context)
    if plan.options.federated:
        return federated.run(context, plan)
    wanted = ContinueFrom.of(context.params.get("continue_from"))
    dataset, path = context.dataset(context.params["dataset"])
    model, source = context.model_source(context.params["base_model"])
    plan = replace(plan, options=fitted(find_method(plan.method), plan.options, model.ref.quantisation))
    start = None if wanted is None else fetch_start(context, wanted, model)
    if start is not None:
        plan = replace(plan, options=continued_options(find_method(plan.method), plan.options, start.manifest))
    base = BaseFiles(model.name, source.location, source.revision)
    data = DataFile(path, dataset.format)
    checkpoints = Checkpoints(context)
    zero = None
    if context.params.get("transferable") is not None:
        zero = TransferableTraining(context, checkpoints, plan, base, model.ref, data)
    resumed = checkpoints.fetch()
    beside: Sequence[Beside] = ()
    trained_before = None if zero is None else zero.trained(resumed)
    if trained_before is None:
        observer = JobObserver(context, checkpoints, (0.0, 1.0 if zero is None else ADAPTER_SHARE))
        inputs = Inputs(base, data, context.scratch, None if resumed is None else resumed[0], start)
        output = context.scratch / "trained"
        method = find_method(plan.method).load(plan.options)
        found = train_adapter(plan, method, inputs, output, observer)
        report, beside = found.to_dict(), found.beside
        observer.flush()
        if not plan.options.trains_base:
            output, told = for_engine(context, output)
            report |= told
        if zero is not None:
            output = zero.keep(output, report)
    else:
        output, report = trained_before
    report |= described(plan)
    if plan.options.trains_base:
        name = context.params.get("name") or default_name(dataset.name, plan.method)
        return JobOutcome(report=report, models=(NewModel(output, name, recipe_of(plan, context)),))
    trained = replace(
        trained_adapter(context, plan, output, dataset.name, model, report["steps"]),
        parents=() if wanted is None else (Parent(wanted.adapter, recipe_of(plan, context)),),
    )
    if zero is None:
        others = tuple(
            replace(
                trained,
                directory=other.directory,
                name=default_name(trained.name, other.name),
                description=other.description,
            )
            for other in beside
        )
        return JobOutcome((trained, *others), report)
    kept = zero.run(report)
    return JobOutcome((trained,), report, files=kept.files, also=kept.publish)


def fetch_start(context: JobContext, wanted: ContinueFrom, model: StoredModel) -> Start:
    """The adapter to go on from, with its files; one that was deleted since the job was submitted will do.

    Raises:
        NotFound: it was gone before that.
        BaseMismatch: it is known to belong to another base model.
        BlobMissing, BlobCorrupt, BlobStoreUnavailable: its files can not be had.
    """
    stored, directory = context.adapter(wanted.adapter, deleted=True)
    level, warnings = check_base(stored.id, stored.base, model.ref, wanted.minimum_compatibility)
    return Start(stored.id, stored.manifest, directory, level, warnings)


def recipe_of(plan: Plan, context: JobContext) -> dict[str, Any]:
    """All that is needed to train from the earlier adapter to this one again."""
    return {
        "method": plan.method,
        **described(plan),
        "dataset": context.params["dataset"],
        "base_model": context.params["base_model"],
    }


class JobObserver:
    """Carries what happens in a training to the job's row, its series and its checkpoint.

    A long training tells less often, so that its events do not grow without end. Of several ranks the first one tells.

    Args:
        share: where on the job's progress bar the training begins and ends.
    """

    def __init__(self, context: JobContext, checkpoints: Checkpoints, share: tuple[float, float] = (0.0, 1.0)) -> None:
        self._context, self._checkpoints, self._share = context, checkpoints, share
        self._points: list[Point] = []
        self._began = self._told = time.monotonic()

    def stop_wanted(self) -> bool:
        return self._context.stop_wanted

    def progress(self, fraction: float, message: str) -> None:
        self._context.progress(self._placed(fraction), message)

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        if self._context.rank != 0:
            return
        self._points.append(Point(step, dict(values)))
        now = time.monotonic()
        between = min(max(SECONDS_BETWEEN, (now - self._began) / 500), LONGEST_BETWEEN)
        if now - self._told < between or self._context.stop_wanted:
            return
        self._told = now
        fraction = self._placed(BEFORE + (LOOP - BEFORE) * step / total)
        self._context.progress(fraction, f"step {step} of {total}, loss {values['loss']:.4g}", step, total)
        self.flush()

    def checkpoint(self, folder: Path, step: int) -> bool:
        self.flush()  # what goes on from here does not measure these steps again
        return self._checkpoints.publish(folder, step)

    def _placed(self, fraction: float) -> float:
        begin, end = self._share
        return begin + (end - begin) * fraction

    def flush(self) -> None:
        """Write the numbers of the steps since the last time.

        Raises:
            AttemptStale, AttemptCancelled
        """
        spec = self._context.spec
        try:
            while self._points:
                with self._context.database.write() as session:
                    record_metrics(session, spec.job_id, spec.attempt, self._points[:POINTS_AT_ONCE])
                del self._points[:POINTS_AT_ONCE]
        except DatabaseUnavailable as error:
            log.warning("metrics_not_written", job_id=spec.job_id, error=error.detail)
