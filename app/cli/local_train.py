"""A training of files on this machine with no service: the same engine that a job uses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.cli.recipe import Recipe
from artifacts.errors import FieldError, RequestInvalid

REPORT_FILE, CURVE_FILE = "train_report.json", "loss_curve.svg"
BESIDE = "beside"


class _Watcher:
    """Shows progress and collects the series; the training is stopped by the keyboard."""

    def __init__(self, advance: Callable[[float, str], None]) -> None:
        self._advance = advance
        self.series: list[tuple[int, Mapping[str, float]]] = []

    def stop_wanted(self) -> bool:
        return False

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        from train.engine import BEFORE, LOOP

        self.series.append((step, dict(values)))
        share = BEFORE + (LOOP - BEFORE) * step / total
        self._advance(share, f"step {step} of {total}, loss {values['loss']:.4g}")

    def checkpoint(self, folder: Path, step: int) -> bool:
        """A training at the terminal keeps none: it is not taken up again."""
        return False

    def progress(self, fraction: float, message: str) -> None:
        self._advance(fraction, message)


def train_local(recipe: Recipe, output: Path, *, device: str, progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Train into the new folder `output` and return the report, which is also written beside the weights.

    Nothing is left at `output` when the training fails.

    Raises:
        RankwiseError: whatever the job would end with.
    """
    assert recipe.model_folder is not None
    assert recipe.dataset_file is not None
    _check(recipe, output)
    from artifacts.base_model import inspect_base
    from artifacts.intake import inspect as inspect_adapter
    from train.catalog import find_method, parse_parameters
    from train.continuation import Start, continued_options
    from train.engine_outlook import check_trained
    from train.packed_base import fitted
    from train.rows import find_format, inspect

    request = recipe.request
    options = parse_parameters(request.method, request.parameters)
    options = fitted(find_method(request.method), options, inspect_base(recipe.model_folder).quantisation)
    start = None
    if recipe.adapter_folder is not None:
        start = Start(str(recipe.adapter_folder), inspect_adapter(recipe.adapter_folder), recipe.adapter_folder)
        options = continued_options(find_method(request.method), options, start.manifest)
    engine = request.target_engine
    if engine is not None:
        check_trained(find_method(request.method), options, request.full_task.type, (), engine)
    data_format = find_format(recipe.dataset_file, recipe.dataset_file.name)
    inspect(recipe.dataset_file, data_format)
    progress(0.0, "load torch")
    from artifacts.heat_map import write_pictures
    from merge.engine_form import fit_engine
    from train.base_files import BaseFiles
    from train.data import DataFile
    from train.engine import Inputs, Plan, train_adapter
    from train.loss_curve import draw

    plan = Plan(
        method=request.method,
        options=options,
        task=request.full_task,
        training=request.training,
        evaluation=request.evaluation,
        seed=request.seed,
        device=device,
    )
    watcher = _Watcher(progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the last step is a rename inside one file system.
    with tempfile.TemporaryDirectory(prefix=".rankwise-train-", dir=output.parent) as scratch:
        result = Path(scratch) / "adapter"
        inputs = Inputs(
            base=BaseFiles(recipe.model_folder.name, str(recipe.model_folder)),
            data=DataFile(recipe.dataset_file, data_format),
            folder=Path(scratch),
            start=start,
        )
        trained = train_adapter(plan, find_method(request.method).load(options), inputs, result, watcher)
        report = trained.to_dict()
        if engine is not None:
            result, report["target_engine"] = fit_engine(result, engine, Path(scratch) / "for-engine")
        (result / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (result / CURVE_FILE).write_text(draw(watcher.series, request.name or recipe.dataset_file.stem), "utf-8")
        write_pictures(report["own"], result)
        for other in trained.beside:
            (result / BESIDE).mkdir(exist_ok=True)
            other.directory.rename(result / BESIDE / other.directory.name)
        if output.exists():
            output.rmdir()
        result.rename(output)
    return report


def _check(recipe: Recipe, output: Path) -> None:
    """Raises RequestInvalid for what only the service can do, and for an output that is there already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestInvalid(f"{output} is there already and not empty.", hint="Choose another -o, or remove it.")
    if recipe.request.continue_from is not None and recipe.adapter_folder is None:
        raise RequestInvalid(
            f"continue_from names no folder: {recipe.body['continue_from']}. "
            "A training of files goes on from an adapter in a folder.",
            hint="`rankwise adapters download` writes one.",
        )
    if recipe.request.transferable is not None:
        raise RequestInvalid(
            "A training of files makes no transferable adapter: what it keeps is confidential, and a folder is not.",
            hint="Train on the service, or leave `transferable` out.",
            errors=[FieldError("/transferable", "needs the service")],
        )
