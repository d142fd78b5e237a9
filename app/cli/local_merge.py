"""Merges of files on this machine, with no service: the same intake, plan and engine that a job uses."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli.adapters import files_of
from app.cli.options import plain_name
from artifacts.errors import RankwiseError, RequestInvalid
from artifacts.labels import labels_of
from merge.pictures import pictures_of_comparison

if TYPE_CHECKING:
    from merge.options import MergeOptions
    from merge.plan import MergeInput

REPORT_FILE = "merge_report.json"
COMPARISON_FILE = "comparison_report.json"
RESULT = "merged"


def merge_local(
    inputs: Sequence[Path],
    weights: Sequence[float],
    method: str,
    parameters: Mapping[str, Any],
    output: Path,
    *,
    name: str | None,
    target_engine: str | None = None,
    device: str,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Merge `inputs` into the new folder `output` and return the report, which is also written beside the weights.

    The files go through the same checks as an upload. Nothing is left at `output` when the merge fails.

    Raises:
        RankwiseError: whatever the service would answer, with the input's path in front.
    """
    from artifacts.engine_outlook import parse_engine
    from merge.catalog import parse_parameters
    from merge.engine_form import check_merged, fit_engine
    from merge.plan import at_least_rank, plan_merge

    options = parse_parameters(method, parameters)
    with _beside(output) as scratch:
        taken = take_in(inputs, weights, scratch, progress)
        # Refuse before torch is loaded: that takes seconds.
        plan = plan_merge([item for item, _ in taken], method, options)
        engine = None if target_engine is None else parse_engine(target_engine)
        if engine is not None:
            check_merged(at_least_rank(plan, options), engine)
        progress(0.1, "load torch")
        from merge.engine import merge_files

        result = scratch / RESULT
        report = merge_files(
            taken,
            method,
            options,
            result,
            progress=lambda fraction, message: progress(0.1 + 0.9 * fraction, message),
            device=device,
            lineage=_recipe(name, method, options, [item for item, _ in taken]),
            check=None if engine is None else partial(check_merged, engine=engine),
        ).to_dict()
        if engine is not None:
            report["target_engine"] = fit_engine(result, engine, scratch / "for-engine")[1]
        _write_report(result / REPORT_FILE, report)
    return report


def compare_local(
    inputs: Sequence[Path],
    weights: Sequence[float],
    candidates: Sequence[tuple[str, Mapping[str, Any]]],
    output: Path,
    *,
    device: str,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Merge `inputs` by every candidate (method, parameters), each into a folder of the new folder `output`.

    Returns the report, which is also written into `output`, with a picture of every table.

    Raises: as `merge_local`.
    """
    from merge.catalog import parse_parameters
    from merge.plan import plan_merge

    options = [(method, parse_parameters(method, parameters)) for method, parameters in candidates]
    labels = labels_of([{"method": method} for method, _ in candidates])
    with _beside(output) as scratch:
        taken = take_in(inputs, weights, scratch, progress)
        described = [item for item, _ in taken]
        for method, found in options:
            plan_merge(described, method, found)
        progress(0.1, "load torch")
        from merge.comparison import Candidate, compare_files
        from merge.comparison_report import comparison_report

        started = time.monotonic()
        compared = compare_files(
            taken,
            [
                Candidate(label, method, found, _recipe(None, method, found, described))
                for label, (method, found) in zip(labels, options, strict=True)
            ],
            scratch / RESULT,
            progress=lambda fraction, message: progress(0.1 + 0.9 * fraction, message),
            device=device,
        )
        report = comparison_report(compared, time.monotonic() - started)
        for item in compared:
            _write_report(item.directory / REPORT_FILE, item.report.to_dict())
            item.directory.rename(item.directory.with_name(plain_name(item.candidate.label)))
        _write_report(scratch / RESULT / COMPARISON_FILE, report)
        for picture in pictures_of_comparison(report):
            (scratch / RESULT / f"{picture.name}.svg").write_text(picture.draw(), encoding="utf-8")
    return report


def _write_report(path: Path, report: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder to work in, whose `RESULT` becomes `output` when nothing went wrong.

    Raises:
        RequestInvalid: `output` is there already and not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestInvalid(f"{output} is there already and not empty.", hint="Choose another -o, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the last step is a rename inside one file system.
    with tempfile.TemporaryDirectory(prefix=".rankwise-merge-", dir=output.parent) as name:
        scratch = Path(name)
        (scratch / RESULT).mkdir()
        yield scratch
        if output.exists():
            output.rmdir()
        (scratch / RESULT).rename(output)


def take_in(
    inputs: Sequence[Path], weights: Sequence[float], scratch: Path, progress: Callable[[float, str], None]
) -> list[tuple[MergeInput, Path]]:
    """Every input through intake, into folders below `scratch`."""
    taken = []
    for place, (path, weight) in enumerate(zip(inputs, weights, strict=True)):
        progress(0.1 * place / len(inputs), f"check {path}")
        taken.append(_take_in(path, weight, scratch / f"input-{place}"))
    return taken


def _recipe(name: str | None, method: str, options: MergeOptions, inputs: Sequence[MergeInput]) -> dict[str, Any]:
    """All that is needed to do the merge again; paths of this machine stay out of the file."""
    return {
        "name": name or output_name(method, inputs),
        "method": method,
        "parameters": options.model_dump(mode="json"),
        "adapters": [{"name": item.name, "weight": item.weight, "weights_digest": item.digest} for item in inputs],
        "versions": {library: version(library) for library in ("rankwise", "torch")},
    }


def output_name(method: str, inputs: Sequence[MergeInput]) -> str:
    return f"merge of {' + '.join(item.name for item in inputs)} ({method})"


def _take_in(path: Path, weight: float, workdir: Path) -> tuple[MergeInput, Path]:
    """One input through intake: staged as an upload is, checked, described."""
    from artifacts.base_model import BaseModelRef
    from artifacts.intake import IntakeLimits, inspect, receive
    from merge.plan import UNKNOWN_BASE, MergeInput

    staging = workdir / "staging"
    staging.mkdir(parents=True)
    try:
        staged = []
        for number, source in enumerate(files_of(path)):
            target = staging / str(number)
            _link_or_copy(source, target)
            staged.append((source.name, target))
        directory = receive(staged, workdir, IntakeLimits())
        manifest = inspect(directory)
    except RankwiseError as error:
        error.detail = f"{path}: {error.detail}"
        raise
    base = BaseModelRef.named(manifest.base_model or UNKNOWN_BASE, manifest.base_model_revision)
    return MergeInput.of(manifest, str(path), path.name, base, weight), directory


def _link_or_copy(source: Path, target: Path) -> None:
    """Intake may move what it is given, so it gets another name of the bytes, or a copy on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
