"""A merge job of the method "search": merges are tried and measured one after another, and the best is handed over."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.errors import ReloadMismatch, RequestInvalid
from artifacts.free_memory import free_memory
from artifacts.menu import validated
from merge import engine
from merge.catalog import SEARCH
from merge.comparison import Candidate, StackShelf, compare_files
from merge.search import State, Trial, best_of, is_exhausted, propose, same_merge
from merge.search_options import SearchOptions
from merge.search_space import Proposal, SearchSpace
from train.metrics import HIGHER_IS_BETTER
from workers.checkpointing import Checkpoints
from workers.context import JobContext, JobOutcome
from workers.jobs.merge_evaluation import MergeEvaluation
from workers.jobs.merge_inputs import MergeSources
from workers.jobs.target_engine import check_for_engine, for_engine

TRIALS = "trials.json"
_SHELF_SHARE = 4  # of the free memory one part for what was read
# Shares of the progress bar.
_FETCHED, _PREPARED, _SEARCHED, _MERGED = 0.05, 0.1, 0.9, 0.97


def run(context: JobContext) -> JobOutcome:
    """Search as the job's parameters say.

    `params`: {adapters: [{id, weight}], method: "search", parameters, evaluation, name}. The trials are all the state
    of the search, and they are kept after each: an interrupted search goes on behind the last of them.

    Raises:
        RequestInvalid: nothing that was tried could be merged and measured.
        NotFound, FileBroken, AttemptCancelled, AttemptStale: as of a comparison with an evaluation.
    """
    options = validated(SearchOptions, context.params["parameters"])
    sources = MergeSources.fetch(context, _FETCHED)
    space = SearchSpace.of(options, [weight for _, weight, _ in sources.items])
    kept = _KeptTrials(context)
    trials = kept.fetch()
    search = _Search(context, sources, options, len(trials))
    while (ended := _ended(space, options, trials)) is None:
        search.begin(len(trials))
        point = propose(space, trials, sampler=options.sampler, startup=options.startup_trials, seed=options.seed)
        trials.append(search.tried(Trial.at(len(trials), point, space.proposal(point), state="failed"), trials))
        kept.publish(trials)
    ranking = best_of(trials)
    if not ranking:
        problem = next((trial.problem for trial in trials if trial.problem), "no merge could be measured")
        raise RequestInvalid(f"None of the {len(trials)} trials could be merged and measured. The first: {problem}")
    return search.outcome(space, trials, ranking, ended)


class _Search:
    """What the trials of one attempt have in common."""

    def __init__(self, context: JobContext, sources: MergeSources, options: SearchOptions, done: int) -> None:
        self._context, self._sources, self._options, self._number = context, sources, options, done
        # After the device's memory ran out once, main memory takes the job.
        self._device = "cpu" if context.reduce_memory else context.device
        context.progress(_FETCHED, "loading the base model")
        self._prepared = False
        self._evaluation = MergeEvaluation(context, context.params["evaluation"], self._tick)
        self._prepared = True
        # Of what the base model left.
        self._shelf = StackShelf(free_memory(self._device) // _SHELF_SHARE)

    def begin(self, number: int) -> None:
        """A trial begins."""
        self._number = number

    def _tick(self, done: int, total: int) -> None:
        if not self._prepared:
            share = _FETCHED + (_PREPARED - _FETCHED) * done / total
            self._context.progress(share, f"measuring the base model: row {done} of {total}", done, total)
        else:
            self._tell(0.2 + 0.8 * done / total, f"row {done} of {total}")

    def _tell(self, part: float, message: str) -> None:
        """How far the trial is, as a part of it."""
        trials = self._options.trials
        fraction = _PREPARED + (_SEARCHED - _PREPARED) * (self._number + part) / trials
        message = f"trial {self._number + 1} of {trials}: {message}"
        self._context.progress(fraction, message, self._number, trials)

    def tried(self, wanted: Trial, earlier: Sequence[Trial]) -> Trial:
        """The trial with what was found. Raises AttemptCancelled, AttemptStale."""
        self._context.check_cancelled()
        same = same_merge(earlier, wanted)
        if same is not None:
            state: State = "failed" if same.state == "failed" else "repeated"
            return replace(same, number=wanted.number, point=wanted.point, label=wanted.label, state=state, seconds=0.0)
        started = time.monotonic()
        folder = self._context.scratch / "trial"
        try:
            return replace(self._measured(wanted, folder), seconds=round(time.monotonic() - started, 3))
        except (RequestInvalid, ReloadMismatch) as error:
            # A merge that can not be done, or overflows what it is written in, is an answer; the others go on.
            return replace(wanted, problem=error.detail, seconds=round(time.monotonic() - started, 3))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _measured(self, wanted: Trial, folder: Path) -> Trial:
        proposal = Proposal(wanted.label, wanted.method, wanted.parameters, tuple(wanted.weights))
        (compared,) = compare_files(
            self._sources.weighted(proposal.weights).inputs(),
            [Candidate(wanted.label, wanted.method, proposal.options)],
            folder,
            progress=lambda part, message: self._tell(0.2 * part, message),
            device=self._device,
            shelf=self._shelf,
            check=partial(check_for_engine, self._context),
        )
        found = self._evaluation.of(compared.directory)
        return replace(
            wanted,
            state="measured",
            value=self._evaluation.order(found["figures"]),
            rank=compared.report.rank,
            relative_error=compared.report.totals()["relative_error"],
            figures=found,
        )

    def outcome(self, space: SearchSpace, trials: Sequence[Trial], ranking: Sequence[Trial], ended: str) -> JobOutcome:
        """The best merge again, byte for byte what it was, with its whole report."""
        best, context = ranking[0], self._context
        proposal = space.proposal(best.point)
        sources = self._sources.weighted(proposal.weights)
        recipe = sources.recipe(proposal.method, proposal.options)
        output = context.scratch / "merged"
        report = engine.merge_files(
            sources.inputs(),
            proposal.method,
            proposal.options,
            output,
            progress=lambda part, message: context.progress(
                _SEARCHED + (_MERGED - _SEARCHED) * part, f"the best again: {message}"
            ),
            device=self._device,
            # The same as that of the merge alone: what was searched is no part of the file.
            lineage=recipe,
        ).to_dict()
        output, told = for_engine(context, output)
        report |= told
        context.progress(_MERGED, "storing the best")
        name = context.params.get("name")
        found = {
            "trial": best.number,
            "metric": self._evaluation.metric,
            "options": self._options.model_dump(mode="json"),
            "optuna": version("optuna"),
            "trials": [_brief(trial) for trial in trials],
        }
        adapter = sources.adapter(output, proposal.method, recipe, name, search=found)
        return JobOutcome(
            (adapter,),
            {
                "method": SEARCH.name,
                "parameters": self._options.model_dump(mode="json"),
                "metric": self._evaluation.metric,
                "higher_is_better": HIGHER_IS_BETTER[self._evaluation.metric],
                "best": best.number,
                "ranking": [trial.number for trial in ranking],
                "ended_by": ended,
                "trials": [_row(trial) for trial in trials],
                "evaluation": self._evaluation.report(),
                "merge": report,
                "optuna": version("optuna"),
                "seconds": round(math.fsum(trial.seconds for trial in trials), 3),
            },
        )


class _KeptTrials:
    """The trials of the job in its checkpoint."""

    def __init__(self, context: JobContext) -> None:
        self._checkpoints = Checkpoints(context)
        self._folder = context.scratch / "kept"

    def fetch(self) -> list[Trial]:
        """Those of earlier attempts."""
        found = self._checkpoints.fetch()
        if found is None:
            return []
        return [Trial(**item) for item in json.loads((found[0] / TRIALS).read_text(encoding="utf-8"))]

    def publish(self, trials: Sequence[Trial]) -> None:
        """Keep all of them. Raises AttemptCancelled, AttemptStale, DiskFull."""
        self._folder.mkdir(exist_ok=True)
        (self._folder / TRIALS).write_text(json.dumps([trial.to_dict() for trial in trials]), encoding="utf-8")
        self._checkpoints.publish(self._folder, len(trials))


def _ended(space: SearchSpace, options: SearchOptions, trials: Sequence[Trial]) -> str | None:
    """What ends the search here, if anything does."""
    if len(trials) >= options.trials:
        return "trials"
    spent = math.fsum(trial.seconds for trial in trials)
    if options.seconds is not None and trials and spent >= options.seconds:
        return "seconds"
    return "exhausted" if is_exhausted(space, trials) else None


def _row(trial: Trial) -> dict[str, Any]:
    """A trial in the report."""
    found = trial.to_dict()
    del found["point"]
    measured: Mapping[str, Any] = found.pop("figures")
    return {**found, **measured}


def _brief(trial: Trial) -> dict[str, Any]:
    """A trial in the lineage."""
    names = ("number", "method", "parameters", "weights", "state", "value")
    return {name: value for name, value in trial.to_dict().items() if name in names}
