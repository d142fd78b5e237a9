"""Whether an image can be composed, from what the database knows of its base model and its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy.orm import Session

from app.base_models import base_model
from app.main_memory import memory_of_all
from app.schemas.compose import CompareParams, ComposeParams, ComposeScene
from app.settings import Settings
from app.stored_inputs import stored_adapters
from artifacts.base_model import PIPELINE_INDEX, UNET, Fingerprint, check_modules
from artifacts.errors import ComposeRefused, FieldError, RequestInvalid
from artifacts.manifest import LoraModule
from artifacts.pointers import pointers_below
from compose.catalog import find_method
from compose.memory import check_fits, estimate
from compose.pipeline_facts import PipelineFacts
from compose.precision import Precision, precision_of
from compose.request import CompositionRequest
from compose.stored_tokenizers import check_lengths
from compose.validation import Validated, validate
from storage import adapters, models
from storage.tables import AdapterRow, ModelRow

_TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.", "text_model.")
LOW_RANK = ("lora", "rslora", "dora", "dylora")
_LISTED = 20


def check_compose(settings: Settings, session: Session, request: ComposeParams, devices: int = 1) -> str:
    """Refuse what can never be composed.

    Returns:
        The id of the base model.

    Raises:
        RequestInvalid and its kin: see `_check_scene`; or the request does not fit itself (`compose.validation`), or
            the pipeline (`compose.pipeline_facts`).
    """
    plain = request.scene(request.method, request.parameters)
    validated = validate(plain, find_method(request.method).capabilities.yields)
    row = _check_scene(session, request, devices)
    pipeline = _Pipeline.of(settings, session, row)
    if pipeline is not None:
        pipeline.check(request.precision, plain, validated)
    return row.id


def check_compare(settings: Settings, session: Session, request: CompareParams, devices: int = 1) -> str:
    """As `check_compose`, for every method; findings about one point below `/methods/{its position}`."""
    plain = [request.scene(item.method, item.parameters) for item in request.methods]
    validated = []
    for position, scene in enumerate(plain):
        with _of_method(position):
            validated.append(validate(scene))
    row = _check_scene(session, request, devices)
    pipeline = _Pipeline.of(settings, session, row)
    if pipeline is not None:
        for position, (scene, found) in enumerate(zip(plain, validated, strict=True)):
            with _of_method(position):
                pipeline.check(request.precision, scene, found)
    return row.id


@contextmanager
def _of_method(position: int) -> Iterator[None]:
    """Findings about a method point to the one that it is about; others stay as they are."""
    place = f"/methods/{position}"
    with pointers_below(f"{place}/method", "/method"), pointers_below(f"{place}/parameters", "/parameters"):
        yield


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """A pipeline whose files this server sees. `memory` of the machine is None where it is not known."""

    folder: Path
    facts: PipelineFacts
    memory: int | None

    @classmethod
    def of(cls, settings: Settings, session: Session, row: ModelRow) -> _Pipeline | None:
        """None if the server does not see it: its workers may run elsewhere."""
        if row.source != "path":
            return None
        folder = Path(row.location).resolve()
        roots = [root.resolve() for root in settings.model_roots]
        if not any(folder.is_relative_to(root) for root in roots) or not (folder / PIPELINE_INDEX).is_file():
            return None
        return cls(folder, PipelineFacts.read(folder), memory_of_all(settings, session))

    def check(self, precision: Literal["auto"] | Precision, scene: CompositionRequest, validated: Validated) -> None:
        """Raises ComposeRefused: what does not suit the pipeline, or its text encoders, or can not fit into the
        memory."""
        options = validated.options
        self.facts.check(scene, options)
        check_lengths(self.folder, options.told(scene, validated.prompts))
        if self.memory is not None:  # which is known of CPUs only
            needed = estimate(self.folder, self.facts, scene, options, precision_of(precision, "cpu"))
            check_fits(needed, self.memory, "this machine")


def _check_scene(session: Session, request: ComposeScene, devices: int) -> ModelRow:
    """Check what a scene names.

    Returns:
        The base model.

    Raises:
        RequestInvalid: an unknown or removed base model, an unknown adapter, several devices.
        ComposeRefused: the base model is no pipeline; an adapter is no LoRA, or does not fit it.
    """
    if devices > 1:
        problem = "an image is made on one device"
        raise RequestInvalid(f"{problem}.", errors=[FieldError("/resources/devices", problem)])
    row = base_model(session, request.base_model, lock=True)
    if row.architecture is not None and row.architecture != UNET:
        problem = f"the base model {row.name!r} is a {row.architecture}, no diffusers pipeline with a UNet"
        raise ComposeRefused(
            f"T{problem[1:]}.",
            hint="Register the folder of a StableDiffusionPipeline or a StableDiffusionXLPipeline.",
            errors=[FieldError("/base_model", problem)],
        )
    named = [(f"/concepts/{position}/adapter", item.adapter) for position, item in enumerate(request.concepts)]
    named += [(f"/styles/{position}/adapter", item.adapter) for position, item in enumerate(request.styles)]
    found = stored_adapters(session, named)
    fingerprint = models.ref_of(row).fingerprint
    for pointer, adapter_id in named:
        _check_fits(row.name, fingerprint, found[adapter_id], pointer)
    return row


def _check_fits(base: str, fingerprint: Fingerprint | None, row: AdapterRow, pointer: str) -> None:
    """Refuse an adapter that is no LoRA, or whose layers in the UNet are not those of the base model's."""
    if row.method not in LOW_RANK:
        problem = f"the adapter {row.name!r} is of type {row.method}; images are composed of LoRAs"
        raise ComposeRefused(f"T{problem[1:]}.", errors=[FieldError(pointer, problem)])
    if fingerprint is None:
        return
    modules = [module for module in adapters.manifest_of(row).modules if _is_comparable(module)]
    offenders = check_modules(fingerprint, modules)
    if not offenders:
        return
    if len(offenders) == len(modules):
        problem = f"the adapter {row.name!r} matches no module of the base model {base!r}"
    else:
        problem = f"{len(offenders)} of {len(modules)} modules of the adapter {row.name!r} do not fit {base!r}"
    raise ComposeRefused(
        f"{problem[0].upper()}{problem[1:]}: {offenders[0]}.",
        hint="It belongs to another family of models. Take adapters that were trained on this one.",
        errors=[FieldError(pointer, problem), *(FieldError(pointer, item) for item in offenders[:_LISTED])],
    )


def _is_comparable(module: LoraModule) -> bool:
    """Whether the base model's fingerprint says something of it: of the UNet's linear layers it does."""
    return module.kind == "linear" and not module.path.startswith(_TEXT_PREFIXES)
