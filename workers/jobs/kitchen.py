"""What jobs that compose have in common: adapters fetched, a pipeline that is warm, steps told, images with files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.base_model import compare
from artifacts.errors import FieldError, NotFound
from compose.composition import Composition, StepReport
from compose.engine import compose_with
from compose.evidence_files import write_files
from compose.precision import Precision, precision_of
from compose.recipe import Ingredient, recipe_of
from compose.request import DEFAULT_STEPS, CompositionRequest, Concept, Style
from compose.safety import loaded_checker
from compose.validation import validate
from storage.images import ImageFacts
from workers.context import JobContext, NewFile, NewImage, StoredAdapter, StoredModel

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.pipelines import LoadedPipeline

PREVIEW_SIDE = 256
PREVIEW_TYPE = "image/jpeg"
_PREVIEW_QUALITY = 80
# Shares of the progress bar.
FETCHED, SAMPLED = 0.05, 0.95
_LESS_MEMORY = {"gradient_caching": "always", "batch_branches": "never"}


@dataclass(frozen=True, slots=True)
class Kitchen:
    """What a job's images are made with: its pipeline, and its adapters by id."""

    context: JobContext
    model: StoredModel
    loaded: LoadedPipeline
    adapters: Mapping[str, tuple[StoredAdapter, Path]]
    precision: Precision

    @classmethod
    def of(cls, context: JobContext) -> Kitchen:
        """Fetch the adapters and have the pipeline loaded. Raises as `workers.jobs.compose.run`."""
        precision = precision_of(context.params.get("precision") or "auto", context.device)
        adapters = _fetch(context)
        context.progress(FETCHED / 2, "loading the base model")
        model, loaded = context.pipeline(context.params["base_model"], precision)
        return cls(context, model, loaded, adapters, precision)

    def request(self, method: str, parameters: Mapping[str, Any]) -> CompositionRequest:
        """The job's request, by this method."""
        params = self.context.params
        given = dict(parameters)
        if self.context.reduce_memory:
            given |= _less_memory(method)
        return CompositionRequest(
            base=Path(self.model.ref.location),
            concepts=tuple(
                Concept(*self._adapter(item), item["trigger"], item["noun"], float(item.get("weight", 1.0)))
                for item in params["concepts"]
            ),
            styles=tuple(
                Style(*self._adapter(item), float(item.get("weight", 1.0))) for item in params.get("styles") or ()
            ),
            prompt=params["prompt"],
            negative_prompt=params.get("negative_prompt") or "",
            method=method,
            parameters=given,
            seed=int(params.get("seed") or 0),
            width=params.get("width"),
            height=params.get("height"),
            steps=int(params.get("steps") or DEFAULT_STEPS),
        )

    def _adapter(self, item: Mapping[str, Any]) -> tuple[Path, str]:
        stored, folder = self.adapters[item["adapter"]]
        return folder, stored.name

    def compose(self, request: CompositionRequest, tell: Callable[[StepReport], None]) -> Composition:
        """Make one image, and show it to the safety checker if there is one. Raises as `workers.jobs.compose.run`."""
        folder = self.context.spec.safety_checker
        checker = None if folder is None else loaded_checker(Path(folder))  # before the work: without it, none is done
        found = compose_with(self.loaded, request, validate(request), tell)
        if checker is not None:
            checker.check(found.image)
        return found

    def image(self, request: CompositionRequest, found: Composition, folder: Path, *, label: str) -> NewImage:
        """A finished image with its files, written into the new `folder`."""
        params = self.context.params
        ref = self.model.ref
        recipe = recipe_of(
            request,
            found.report,
            {"id": self.model.id, "name": ref.name, "weights_digest": ref.weights_digest, "revision": ref.revision},
            [self._ingredient(item) for item in params["concepts"]],
            [self._ingredient(item) for item in params.get("styles") or ()],
            precision=self.precision,
            device=self.context.device,
        )
        report = {**found.report, **self.circumstances()}
        facts = ImageFacts(
            label=label,
            method=request.method,
            base_model=self.model.name,
            model_id=self.model.id,
            prompt=request.prompt,
            seed=request.seed,
            width=found.image.width,
            height=found.image.height,
            recipe=recipe,
            report=report,
        )
        files = write_files(found, recipe, folder)
        return NewImage(facts, tuple(NewFile(file.path, file.role, file.media_type, file.details) for file in files))

    def _ingredient(self, item: Mapping[str, Any]) -> Ingredient:
        stored, _ = self.adapters[item["adapter"]]
        (weights,) = [file for file in stored.manifest.files if file.path.endswith(".safetensors")]
        return Ingredient(stored.id, stored.name, weights.sha256)

    def circumstances(self) -> dict[str, Any]:
        """For a report: what it was computed with, and how surely each adapter belongs to the base model; that its
        modules fit is seen when it is loaded."""
        found = {}
        for key, (stored, _) in self.adapters.items():
            comparison = None if stored.base is None else compare(stored.base, self.model.ref)
            found[key] = {
                "level": "shape" if comparison is None else comparison.level,
                "contradiction": None if comparison is None else comparison.contradiction,
            }
        return {"precision": self.precision, "device": self.context.device, "compatibility": found}


def _fetch(context: JobContext) -> dict[str, tuple[StoredAdapter, Path]]:
    """Every adapter that the job names, once."""
    asked = [
        (f"/{name}/{position}/adapter", item["adapter"])
        for name in ("concepts", "styles")
        for position, item in enumerate(context.params.get(name) or ())
    ]
    found: dict[str, tuple[StoredAdapter, Path]] = {}
    for number, (pointer, adapter_id) in enumerate(asked):
        if adapter_id in found:
            continue
        context.progress(FETCHED / 2 * number / len(asked), "fetching adapters", number, len(asked))
        try:
            found[adapter_id] = context.adapter(adapter_id)
        except NotFound as error:
            raise NotFound(
                f"The adapter {adapter_id} was deleted since the job was submitted.",
                hint="Upload it again, or compose without it.",
                errors=[FieldError(pointer, error.detail)],
            ) from error
    return found


def _less_memory(method: str) -> dict[str, str]:
    """The parameters of a method with which it takes the least memory."""
    from compose.catalog import find_method

    return {name: value for name, value in _LESS_MEMORY.items() if name in find_method(method).options.model_fields}


def teller(context: JobContext, begin: float, end: float, what: str = "") -> Callable[[StepReport], None]:
    """Tells each step to the job's row, with a preview now and then; ends the sampling when the job is cancelled.

    Args:
        begin, end: the share of the progress bar that the steps take.
        what: before each message.
    """
    # A preview is shown to nobody before the checker has seen the image.
    every = context.params.get("preview_every") if context.spec.safety_checker is None else None

    def tell(step: StepReport) -> None:
        context.check_cancelled()
        fraction = begin + (end - begin) * step.step / step.total
        context.progress(fraction, f"{what}step {step.step} of {step.total}", step.step, step.total)
        if every and step.step % every == 0 and step.step < step.total:
            picture = step.preview()
            if picture is not None:
                context.preview(step.step, step.total, _preview_bytes(picture), PREVIEW_TYPE)

    return tell


def _preview_bytes(picture: Image) -> bytes:
    """A small JPEG."""
    small = picture.convert("RGB")
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    target = io.BytesIO()
    small.save(target, "JPEG", quality=_PREVIEW_QUALITY)
    return target.getvalue()
