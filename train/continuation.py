"""Going on from a stored adapter: whether it fits the method and the base model, and what it decides. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from artifacts.base_model import BaseModelRef, Level, compare
from artifacts.errors import BaseMismatch, FieldError, RequestInvalid, ShapeMismatch
from artifacts.manifest import AdapterManifest, LoraModule
from artifacts.peft_config import parse_config
from train.menu_row import Method
from train.options.bone import INIT_WEIGHTS, Variant
from train.options.common import MAX_TARGETS, LowRankOptions, Target, TrainOptions

AdapterId = Annotated[str, StringConstraints(pattern=r"^adp_[0-9a-f]{32}$")]
POINTER = "/continue_from"
USUAL_HEADS = frozenset({"classifier", "score"})
"""PEFT names them in the configuration of every classifier, whether its model has them or not."""
NAMED_OFFENDERS = 20
FACTORED = ("lora", "rslora", "dora")
"""The types whose files hold A and B for every layer."""


class ContinueFrom(BaseModel):
    """The stored adapter that a training goes on from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: AdapterId
    minimum_compatibility: Level | None = Field(
        None,
        description="How surely its base model and this one have to be the same: weights, revision, architecture or "
        "shape; unset, anything will do unless they are known to differ.",
    )

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | ContinueFrom | None) -> ContinueFrom | None:
        """An id alone stands for the adapter with the defaults."""
        if value is None or isinstance(value, cls):
            return value
        return cls.model_validate({"adapter": value} if isinstance(value, str) else value)


@dataclass(frozen=True, slots=True)
class Start:
    """The adapter that a training goes on from.

    Attributes:
        name: how the report and messages call it: its id, or its folder.
        directory: with its files.
        layers: path in the base model → the adapter's module there; empty for kinds whose files are not described
            by module. `placed` fills it in.
    """

    name: str
    manifest: AdapterManifest
    directory: Path
    level: Level = "shape"
    warnings: Sequence[str] = ()
    layers: Mapping[str, LoraModule] = field(default_factory=dict)

    def placed(self, targets: Sequence[Target], whole: Sequence[str] = ()) -> Start:
        """The same, with its modules at the layers of the base model. Raises as `place`."""
        return replace(self, layers=place(self.manifest, targets, whole))

    def to_dict(self) -> dict[str, str]:
        """For the report."""
        return {"adapter": self.name, "method": self.manifest.method, "compatibility": self.level}


def continued_options(method: Method, options: TrainOptions, manifest: AdapterManifest) -> TrainOptions:
    """The options with what the adapter decides: its layers, their rank and their scaling.

    Raises:
        RequestInvalid: the method can not go on from such an adapter (at /continue_from), or an option
            says something else than the adapter (at /parameters/…).
    """
    _check_kind(method, manifest)
    decided = _decided(options, manifest)
    problems = [
        FieldError(f"/parameters/{name}", f"{name} is {getattr(options, name)}, but the adapter has {_told(value)}")
        for name, value in decided.items()
        if name in options.model_fields_set and not _agrees(getattr(options, name), value)
    ]
    if problems:
        raise RequestInvalid(
            f"The adapter to go on from does not fit the parameters: {problems[0].message}.",
            hint=f"Leave out what the adapter decides: {', '.join(decided)} and target_modules.",
            errors=problems,
        )
    if "target_modules" not in options.model_fields_set:
        decided["target_modules"] = _targets(manifest)
    try:
        return type(options).model_validate({**options.model_dump(exclude_unset=True), **decided})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place_of = ".".join(str(part) for part in first["loc"])
        problem = f"method {method.name} can not go on from it: {place_of}: {first['msg']}"
        raise RequestInvalid(f"{problem}.", errors=[FieldError(POINTER, problem)]) from error


def alpha_of(options: LowRankOptions, module: LoraModule) -> float:
    """The alpha with which the method scales as this module does, without the last digits' noise of a root."""
    return float(f"{options.alpha_of(module.scaling, module.rank):.12g}")


def check_base(
    name: str, adapter: BaseModelRef | None, base: BaseModelRef, minimum: Level | None
) -> tuple[Level, list[str]]:
    """How surely the adapter belongs to the base model, with warnings.

    Args:
        adapter: its base model, as far as it is known.
        minimum: the level that will do; unset, any will but models that are known to differ.

    Raises:
        BaseMismatch: at /continue_from.
    """
    found = compare(adapter or BaseModelRef.named("unknown"), base)
    error = [FieldError(POINTER, f"made for the base model {adapter.name if adapter else 'unknown'}, not {base.name}")]
    if not found.reaches(minimum):
        raise BaseMismatch(
            f"That {name} belongs to the base model {base.name!r} is proven to the level {found.level!r} only; "
            f"minimum_compatibility asks for {minimum!r}.",
            errors=error,
        )
    if found.contradiction and minimum is None:
        raise BaseMismatch(
            f"{name} belongs to another base model: {found.contradiction}.",
            hint="If you know that it fits, set continue_from.minimum_compatibility to 'architecture' or 'shape'.",
            errors=error,
        )
    warnings = []
    if found.contradiction:
        warnings.append(f"The adapter was made for another base model: {found.contradiction}.")
    if found.level == "shape":
        warnings.append("Nothing but names and shapes shows that the adapter belongs to this base model.")
    return found.level, warnings


def place(
    manifest: AdapterManifest, targets: Sequence[Target], whole: Sequence[str] | None = ()
) -> dict[str, LoraModule]:
    """Path in the base model → the adapter's module there.

    A first component of the path that only one side has makes no difference, as in `artifacts.base_model`.

    Args:
        targets: the layers that are to be trained.
        whole: the modules that are trained whole; None if that is not known yet.

    Raises:
        ShapeMismatch: the adapter has other layers, or for weights of other dimensions; the first twenty are named.
        RequestInvalid: other modules are trained whole than were.
    """
    if whole is not None:
        _check_whole(set(manifest.config.get("modules_to_save") or ()), whole)
    if not manifest.modules:
        return {}
    wanted = {target.path: (target.d_out, target.d_in) for target in targets}
    shortened = {path.partition(".")[2]: path for path in wanted}
    found: dict[str, LoraModule] = {}
    offenders = []
    for module in manifest.modules:
        tries = (module.path, module.path.partition(".")[2], shortened.get(module.path))
        path = next((path for path in tries if path in wanted), None)
        if path is None:
            offenders.append(f"{module.path}: this training adapts no such layer")
        elif any(told not in (0, side) for told, side in zip((module.d_out, module.d_in), wanted[path], strict=True)):
            sides = "×".join(map(str, wanted[path]))
            offenders.append(f"{module.path}: made for a weight of {module.d_out}×{module.d_in}, the layer has {sides}")
        else:
            found[path] = module
    offenders += [f"{path}: the adapter does not have it" for path in sorted(wanted.keys() - found.keys())]
    if offenders:
        raise ShapeMismatch(
            f"The adapter to go on from does not fit the layers of this training: {offenders[0]}.",
            hint="Leave target_modules out: it is trained where it was.",
            errors=[FieldError(POINTER, offender) for offender in offenders[:NAMED_OFFENDERS]],
        )
    return found


def _check_whole(saved: set[str], whole: Sequence[str]) -> None:
    strange = [path for path in saved - USUAL_HEADS if not any(_ends_with(own, path) for own in whole)]
    missing = [path for path in whole if not any(_ends_with(path, own) for own in saved)]
    if strange or missing:
        problem = f"modules trained whole: the adapter has {sorted(saved)}, this training {sorted(whole)}"
        raise RequestInvalid(f"{problem[0].upper()}{problem[1:]}.", errors=[FieldError(POINTER, problem)])


def _check_kind(method: Method, manifest: AdapterManifest) -> None:
    kinds = method.capabilities.continues
    if manifest.method not in kinds:
        told = f"goes on from {' or '.join(kinds)}" if kinds else "always starts anew"
        problem = f"it is of type {manifest.method}; method {method.name} {told}"
        raise RequestInvalid(
            f"The adapter can not be trained on: {problem}.",
            hint="GET /methods tells in capabilities.continues what a method goes on from.",
            errors=[FieldError(POINTER, problem)],
        )
    obstacles = _obstacles(method, manifest)
    if obstacles:
        raise RequestInvalid(
            f"The adapter can not be trained on: {obstacles[0]}.",
            errors=[FieldError(POINTER, obstacle) for obstacle in obstacles],
        )
    broken = sorted(manifest.report.nonfinite)
    if broken:
        problem = f"NaN or infinite values in {broken[0]}"
        raise RequestInvalid(f"The adapter can not be trained on: {problem}.", errors=[FieldError(POINTER, problem)])


def _obstacles(method: Method, manifest: AdapterManifest) -> list[str]:
    """What the adapter has besides what its kind has: nothing that is trained here would keep it."""
    if manifest.method == "miss":
        variant, form = _miss_variant(manifest), f"init_weights is {manifest.config.get('init_weights')!r}"
        if variant is None:
            return [f"{form}: no form of MiSS that is trained here"]
        if variant != "default" and "variant" not in method.options.model_fields:
            return [f"{form}: another form of MiSS than the balanced one; method bone goes on from it"]
    if manifest.format not in ("peft", "safetensors-metadata"):
        return [f"its file is of format {manifest.format}; training goes on from PEFT's own"]
    found = [f"{module.path}: it is no linear layer" for module in manifest.modules if module.kind != "linear"]
    found += [f"{module.path}: lora_B has a bias" for module in manifest.modules if module.bias_key is not None]
    if manifest.format != "peft":
        return found[:NAMED_OFFENDERS] or ([manifest.refusal] if manifest.refusal else [])
    usual = ("modules_to_save", "use_dora", "it is of PEFT type", "it is of Rankwise's type")
    found += [reason for reason in parse_config(manifest.config).refusals if not reason.startswith(usual)]
    return found[:NAMED_OFFENDERS]


def _decided(options: TrainOptions, manifest: AdapterManifest) -> dict[str, Any]:
    """Name → value of the options that follow from the adapter."""
    decided: dict[str, Any] = {}
    plain = manifest.method in FACTORED
    if "rank" in type(options).model_fields:
        decided["rank"] = manifest.rank if plain else manifest.config.get("r", manifest.rank)
    if manifest.method == "miss" and "variant" in type(options).model_fields:
        decided["variant"] = variant = _miss_variant(manifest)
        if variant == "mini":
            decided["mini_r"] = manifest.config.get("mini_r", 1)
    if not plain:
        return decided | options.decided_by(manifest.config)
    shapes = {(module.rank, module.scaling) for module in manifest.modules}
    if len(shapes) > 1 and not options.layers_may_differ:
        listed = ", ".join(f"rank {rank} scaled by {scaling:g}" for rank, scaling in sorted(shapes)[:NAMED_OFFENDERS])
        problem = f"its layers differ ({listed}); this method needs the same in all"
        raise RequestInvalid(f"The adapter can not be trained on: {problem}.", errors=[FieldError(POINTER, problem)])
    if not isinstance(options, LowRankOptions):
        return decided
    largest = max(manifest.modules, key=lambda module: (module.rank, module.path))
    decided["alpha"] = alpha_of(options, largest)
    return decided


def _miss_variant(manifest: AdapterManifest) -> Variant | None:
    """What Bone calls the form of a MiSS adapter; None for one that is none of its variants."""
    found = manifest.config.get("init_weights")
    wanted = True if found is None else found
    return next((variant for variant, told in INIT_WEIGHTS.items() if told == wanted), None)


def _targets(manifest: AdapterManifest) -> list[str] | str:
    """What `target_modules` has to say for the adapter's layers."""
    paths = [module.path for module in manifest.modules]
    if paths:
        return paths if len(paths) <= MAX_TARGETS else sorted({path.rpartition(".")[2] for path in paths})
    named = manifest.config.get("target_modules")
    if named == "all-linear":
        return "all-linear"
    if not isinstance(named, list):
        problem = "its target_modules is a pattern; name the layers in parameters.target_modules"
        raise RequestInvalid(f"The adapter can not be trained on: {problem}.", errors=[FieldError(POINTER, problem)])
    return sorted(str(name) for name in named)


def _agrees(given: Any, value: Any) -> bool:
    if given is None or not isinstance(value, int | float):
        return given in (None, value)
    return math.isclose(float(given), float(value), rel_tol=1e-6)


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)[:100]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
