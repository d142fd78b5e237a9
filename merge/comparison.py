"""Several merges of one pool of adapters, side by side: every module is read once, and its inner products with it.

Comparisons of the same pool that follow each other, as a search makes them, keep on a shelf what they have read.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from artifacts.adapter import Adapter
from artifacts.export import PeftWriter
from merge.engine import COMPUTE_SHARE, Check, MergeRun, Progress
from merge.memory import keep_freed_memory
from merge.options import MergeOptions
from merge.plan import MergeInput, PlannedModule
from merge.reload import Probe, check_reload
from merge.report import MergeReport, ModuleReport
from merge.stack import Stack
from merge.threads import module_threads
from merge.written import WrittenModule

REMEMBERED = 4
"""Results of a module that the next ones are compared with, to be cast and probed once where they are the same."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the merges. `lineage` is stored in its file's metadata."""

    label: str
    method: str
    options: MergeOptions
    lineage: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """A candidate's merge: a PEFT directory, and its report, whose `seconds` are its own share of the work."""

    candidate: Candidate
    directory: Path
    report: MergeReport


class StackShelf:
    """Modules that were read, with their inner products, for comparisons of the same adapters: as many as fit."""

    def __init__(self, limit: int) -> None:
        """Args:
        limit: bytes; what does not fit is read again each time.
        """
        self._limit = limit
        self._used = 0
        self._kept: dict[tuple[object, ...], Stack] = {}
        self._lock = threading.Lock()

    def stack(self, run: MergeRun, module: PlannedModule) -> Stack:
        """The components of a module, under the weights of the run that read it first.

        Raises: as `merge.engine.MergeRun.load`.
        """
        # An adapter of weight 0 takes no part: then it is another stack.
        key = (module.path, run.compute, tuple(owner for owner, _ in module.owners))
        found = self._kept.get(key)
        if found is not None:
            # What a method computes of a stack and leaves with it would be kept too, and would grow with every trial.
            return found.bare()
        stack = run.load(module)
        size = sum(part.numel() * part.element_size() for part in (stack.A, stack.B, stack.gram_A, stack.gram_B))
        with self._lock:
            if self._used + size <= self._limit:
                self._used += size
                self._kept[key] = stack.bare()
        return stack


def compare_files(
    inputs: Sequence[tuple[MergeInput, Path]],
    candidates: Sequence[Candidate],
    folder: Path,
    *,
    progress: Progress | None = None,
    device: str = "cpu",
    shelf: StackShelf | None = None,
    check: Check | None = None,
) -> list[Compared]:
    """Merge the adapters by every candidate, each into a folder below the new `folder`.

    Each result is, byte for byte, what `merge.engine.merge_files` writes for its method. What is the same for several
    candidates is done once: the factors of a module are read and cast, and their Gram matrices computed, once for each
    precision of the computation.

    Args:
        progress, check: as of `merge.engine.merge_files`.
        shelf: of earlier comparisons of the same files, whatever their weights and methods were.

    Raises: as `merge.engine.merge_files`.
    """
    keep_freed_memory()
    tell = progress or (lambda _fraction, _message: None)
    open_adapter = cache(Adapter.open)
    runs = [MergeRun.of(inputs, item.method, item.options, torch.device(device), open_adapter) for item in candidates]
    if check is not None:
        for run in runs:
            check(run.plan)
    places = [folder / str(number) for number in range(len(candidates))]
    with ExitStack() as opened:
        writers = [
            opened.enter_context(run.writer(place, item.lineage))
            for run, place, item in zip(runs, places, candidates, strict=True)
        ]
        found = _merge_modules(runs, writers, tell, shelf or StackShelf(0))
    compared = []
    for number, (run, place, one) in enumerate(zip(runs, places, found, strict=True)):
        started = time.perf_counter()
        fraction = COMPUTE_SHARE + (1 - COMPUTE_SHARE) * number / len(runs)
        message = f"Reading back {candidates[number].label}"
        errors = check_reload(place, one.probes, partial(tell, fraction, message))
        seconds = one.seconds + time.perf_counter() - started
        compared.append(Compared(candidates[number], place, run.report(one.reports, errors, seconds)))
    tell(1.0, "Compared")
    return compared


@dataclass(slots=True)
class _Found:
    """What is known of a candidate so far. `seconds` are those of all threads together."""

    reports: list[ModuleReport] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    seconds: float = 0.0


_Item = tuple[int, ModuleReport, Probe, float]
"""Number of the candidate, what became of a module, and the seconds that it took."""


def _merge_modules(
    runs: Sequence[MergeRun], writers: Sequence[PeftWriter], tell: Progress, shelf: StackShelf
) -> list[_Found]:
    """Every module by every run that has it: modules side by side in threads, the runs of one module in turn."""
    planned: dict[str, list[tuple[int, PlannedModule]]] = {}
    for number, run in enumerate(runs):
        for module in run.plan.modules:
            planned.setdefault(module.path, []).append((number, module))
    for found_in in planned.values():
        # the best factors of a smaller rank are a part of those of a larger one
        found_in.sort(key=lambda item: -runs[item[0]].plan.output_rank)
    paths = sorted(planned)

    def merge(path: str) -> list[_Item]:
        stacks: dict[torch.dtype, Stack] = {}
        weighted: dict[tuple[torch.dtype, tuple[float, ...]], Stack] = {}
        earlier: deque[WrittenModule] = deque(maxlen=REMEMBERED)
        items = []
        for number, module in planned[path]:
            run = runs[number]
            if run.compute not in stacks:
                stacks[run.compute] = shelf.stack(run, module)
            key = (run.compute, tuple(run.plan.weights))
            if key not in weighted:
                weighted[key] = stacks[run.compute].reweighted(run.plan.weights)
            started = time.perf_counter()
            report, probe = run.merge_one(module, weighted[key], writers[number], earlier)
            items.append((number, report, probe, time.perf_counter() - started))
        return items

    found = [_Found() for _ in runs]
    with module_threads() as pool:
        for count, items in enumerate(pool.map(merge, paths), start=1):
            for number, report, probe, seconds in items:
                found[number].reports.append(report)
                found[number].probes.append(probe)
                found[number].seconds += seconds
            tell(COMPUTE_SHARE * count / len(paths), f"Merged {count} of {len(paths)} modules {len(runs)} times")
    return found
