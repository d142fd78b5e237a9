"""An image made on this machine with no service, by the same room that a job uses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.cli.scene import SceneFile
from artifacts.base_model import inspect_base
from artifacts.content import file_sha256
from artifacts.errors import RequestInvalid
from compose.catalog import find_method
from compose.composition import StepReport
from compose.evidence_files import IMAGE, write_files
from compose.precision import precision_of
from compose.recipe import Ingredient, recipe_of
from compose.request import CompositionRequest
from compose.validation import validate

REPORT_FILE = "composition_report.json"
_LOADED = 0.1


def compose_local(
    scene: SceneFile, output: Path, *, device: str, progress: Callable[[float, str], None]
) -> dict[str, Any]:
    """Make the image of a scene whose base model and adapters are files of this machine.

    Args:
        output: a new folder for the image, its masks and its report; or a .png, for the image alone.

    Returns:
        The report.

    Raises:
        RankwiseError: whatever the service would answer. Nothing is left at `output` then.
    """
    request = _request(scene)
    alone = output.suffix.lower() == ".png"
    if output.exists() and (alone or not output.is_dir() or any(output.iterdir())):
        raise RequestInvalid(f"{output} is there already.", hint="Choose another -o, or remove it.")
    precision = precision_of(scene.request.precision, device)
    yields = find_method(request.method).capabilities.yields
    validate(request, yields)  # before torch is loaded, which takes seconds
    if yields == "adapter" and alone:
        raise RequestInvalid(f"{request.method} yields an adapter, which is written into a folder, not a .png.")
    output.parent.mkdir(parents=True, exist_ok=True)
    progress(0.0, "load torch")
    from compose.adapter_files import weights_file
    from compose.engine import compose
    from compose.fused_adapter import fuse
    from compose.pipelines import PipelineCache

    def ingredient(name: str, path: Path) -> Ingredient:
        return Ingredient(None, name, file_sha256(weights_file(path)))

    base = inspect_base(request.base)
    known = {"name": base.name, "weights_digest": base.weights_digest}
    # Beside the output, so that the last step is a rename inside one file system.
    with tempfile.TemporaryDirectory(prefix=".rankwise-compose-", dir=output.parent) as scratch:
        pipelines, result = PipelineCache.of(precision, device), Path(scratch) / "result"
        if yields == "adapter":
            fused = fuse(request, pipelines, result, _teller(progress))
            return _finish(result, output, {**fused.report, "precision": precision, "device": device})
        found = compose(request, pipelines, _teller(progress))
        recipe = recipe_of(
            request,
            found.report,
            known,
            [ingredient(item.name, item.adapter) for item in request.concepts],
            [ingredient(item.name, item.adapter) for item in request.styles],
            precision=precision,
            device=device,
        )
        write_files(found, recipe, result)
        report = {**found.report, "precision": precision, "device": device}
        if alone:
            (result / IMAGE).rename(output)
            return report
        return _finish(result, output, report)


def _finish(result: Path, output: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write the report beside the result, and move both to where they belong."""
    (result / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if output.exists():
        output.rmdir()
    result.rename(output)
    return report


def _request(scene: SceneFile) -> CompositionRequest:
    """The scene with the folders in the place of ids."""
    from app.schemas.compose import ComposeRequest

    asked = scene.request
    if not isinstance(asked, ComposeRequest):
        raise RequestInvalid("Several methods are compared by the service; here one image is made.")
    if scene.model_folder is None:
        raise RequestInvalid("An image that is made here needs a folder as its base model.")

    def place(kind: str, index: int) -> tuple[Path, str]:
        named = str(scene.body[kind][index]["adapter"])
        if named not in scene.adapters:
            raise RequestInvalid(f"{named} is no file of this machine, as the base model is.")
        return scene.adapters[named], Path(named).name

    plain = asked.scene(asked.method, asked.parameters)
    concepts = []
    for index, concept in enumerate(plain.concepts):
        path, name = place("concepts", index)
        concepts.append(replace(concept, adapter=path, name=name))
    styles = []
    for index, style in enumerate(plain.styles):
        path, name = place("styles", index)
        styles.append(replace(style, adapter=path, name=name))
    return replace(plain, base=scene.model_folder, concepts=tuple(concepts), styles=tuple(styles))


def _teller(progress: Callable[[float, str], None]) -> Callable[[StepReport], None]:
    def tell(step: StepReport) -> None:
        progress(_LOADED + (1 - _LOADED) * step.step / step.total, f"step {step.step} of {step.total}")

    return tell
