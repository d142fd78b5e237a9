"""What a merge will do, decided from headers alone: which modules, which rank, and every reason to refuse. No torch.

The API calls `plan_merge` when a merge is submitted, so that an impossible one is refused at once, and the worker
calls it again on the files that it really reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from artifacts.base_model import STRENGTH, BaseModelRef, Level, compare
from artifacts.errors import (
    BaseMismatch,
    FieldError,
    MergeRefused,
    NotMergeable,
    RankOutOfRange,
    RequestInvalid,
    ShapeMismatch,
)
from artifacts.manifest import AdapterManifest, LoraModule
from artifacts.peft_keys import UNSELECTED
from merge.catalog import MergeMethod, find_method
from merge.convertible import CONVERTIBLE
from merge.options import MergeOptions
from merge.sides import with_sides

MAX_ADAPTERS = 256
NAMED_OFFENDERS = 20
UNKNOWN_BASE = "unknown"


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One adapter of a merge. `digest` is its weights digest, `method` its kind (lora, rslora, dora …), `doubts` what
    its upload was warned of that the merged adapter inherits."""

    id: str
    name: str
    digest: str
    modules: Sequence[LoraModule]
    method: str
    mergeable: bool
    refusal: str | None
    base: BaseModelRef
    weight: float = 1.0
    doubts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, manifest: AdapterManifest, adapter_id: str, name: str, base: BaseModelRef | None, weight: float = 1.0
    ) -> Self:
        """The adapter that the manifest describes; `base` is None if nothing is known of its base model."""
        return cls(
            id=adapter_id,
            name=name,
            digest=manifest.weights_digest,
            modules=manifest.modules,
            method=manifest.method,
            mergeable=manifest.mergeable,
            refusal=manifest.refusal,
            base=base or BaseModelRef.named(UNKNOWN_BASE),
            weight=weight,
            doubts=tuple(text for text in manifest.report.warnings if UNSELECTED in text),
        )


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module of the output: the inputs that own it, as (position, the input's own module), and its dimensions."""

    path: str
    owners: tuple[tuple[int, LoraModule], ...]

    @property
    def first(self) -> LoraModule:
        return self.owners[0][1]

    @property
    def rank_sum(self) -> int:
        """Σ rᵢ over the owners: the largest rank that the merged module can use."""
        return sum(module.rank for _, module in self.owners)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge that can be done.

    Attributes:
        modules: the output's modules, sorted by path.
        weights: the effective weight of each input (normalised when asked for).
        output_rank: rank of the written adapter; a module with less is padded with zeros up to it.
        dropped: modules left out by missing_modules="intersection".
        compatibility: the weakest pairwise proof that the inputs share a base model.
    """

    modules: tuple[PlannedModule, ...]
    weights: tuple[float, ...]
    output_rank: int
    dropped: tuple[str, ...]
    compatibility: Level
    warnings: tuple[str, ...]


def plan_merge(inputs: Sequence[MergeInput], method: str, options: MergeOptions) -> MergePlan:
    """Check that `inputs` can be merged by `method` and say how.

    Raises:
        RequestInvalid: no or too many adapters, the same one twice, or unusable weights.
        NotMergeable: an adapter whose ΔW is not scaling·B·A, or with a bias that the method can not sum.
        BaseMismatch: base models known to differ, or a proof weaker than `minimum_compatibility`.
        ShapeMismatch: a module whose dimensions or kind differ between adapters.
        RankOutOfRange: an output rank above Σ rᵢ in every module.
        MergeRefused: no module in common, or modules missing under missing_modules="error".
    """
    row = find_method(method)
    _check_inputs(inputs)
    weights = _effective_weights(inputs, row, options)
    _check_count(weights, row)
    _check_mergeable(inputs, row)
    inputs = with_sides(inputs)
    compatibility, warnings = _base_compatibility(inputs, options.minimum_compatibility)
    modules, dropped = _align(inputs, weights, options)
    if dropped:
        warnings.append(f"{len(dropped)} modules that not every adapter has were left out: {_some(dropped)}.")
    warnings += [f"not_selected: adapter {item.name!r}: {text}" for item in inputs for text in item.doubts]
    warnings += _coverage_warnings(inputs, modules)
    warnings += _padding_warnings(modules, row, options)
    return MergePlan(
        modules=modules,
        weights=weights,
        output_rank=_output_rank(options, modules, method),
        dropped=dropped,
        compatibility=compatibility,
        warnings=tuple(warnings),
    )


def may_share_rank(options: MergeOptions) -> bool:
    """Whether the exact sum is written at the rank of one adapter where all of them turn out to share lora_A."""
    return getattr(options, "rank", None) == "exact" and options.norm_equalize == "none"


def at_least_rank(plan: MergePlan, options: MergeOptions) -> MergePlan:
    """The plan at the least rank that the merge may be written at: headers do not tell whether lora_A is shared."""
    if not may_share_rank(options) or any(
        len({(module.rank, abs(module.scaling)) for _, module in item.owners}) > 1 for item in plan.modules
    ):
        return plan
    return replace(plan, output_rank=max(module.rank for item in plan.modules for _, module in item.owners))


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMED_OFFENDERS
    return ", ".join(names[:NAMED_OFFENDERS]) + (f" and {rest} more" if rest > 0 else "")


def _check_inputs(inputs: Sequence[MergeInput]) -> None:
    if not 1 <= len(inputs) <= MAX_ADAPTERS:
        raise RequestInvalid(
            f"A merge takes 1 to {MAX_ADAPTERS} adapters; {len(inputs)} were given.",
            errors=[FieldError("/adapters", f"needs 1 to {MAX_ADAPTERS} items")],
        )
    seen: dict[str, int] = {}
    for position, item in enumerate(inputs):
        if item.id in seen:
            raise RequestInvalid(
                f"Adapter {item.id} is listed twice (positions {seen[item.id]} and {position}).",
                hint="List it once and give it the sum of the weights.",
                errors=[FieldError(f"/adapters/{position}/id", "duplicate id")],
            )
        seen[item.id] = position


def _effective_weights(inputs: Sequence[MergeInput], row: MergeMethod, options: MergeOptions) -> tuple[float, ...]:
    weights = [float(item.weight) for item in inputs]
    for position, weight in enumerate(weights):
        pointer = f"/adapters/{position}/weight"
        if not math.isfinite(weight):
            raise RequestInvalid(
                f"The weight of {inputs[position].id} is {weight}; it must be a finite number.",
                errors=[FieldError(pointer, "must be finite")],
            )
        if weight < 0 and not row.capabilities.negative_weights:
            raise RequestInvalid(
                f"Method {row.name!r} averages and so takes no negative weight; {inputs[position].id} has {weight}.",
                hint="The methods `linear`, `cat` and `svd` take negative weights.",
                errors=[FieldError(pointer, "must not be negative")],
            )
    if not any(weights):
        raise RequestInvalid(
            "All weights are 0: the merged adapter would do nothing.",
            errors=[FieldError("/adapters", "at least one weight must not be 0")],
        )
    if getattr(options, "t", None) is not None and set(weights) != {1.0}:
        raise RequestInvalid(
            "Give either t or weights: t says how far to go from the first adapter to the second.",
            errors=[FieldError("/parameters/t", "leave it out, or leave the weights at 1")],
        )
    if getattr(options, "normalize", False):
        total = math.fsum(weights)
        if abs(total) < 1e-9 * max(map(abs, weights)):
            raise RequestInvalid(
                f"normalize divides by the sum of the weights, which is {total}.",
                errors=[FieldError("/parameters/normalize", "the weights sum to 0")],
            )
        weights = [weight / total for weight in weights]
    return tuple(weights)


def _check_count(weights: Sequence[float], row: MergeMethod) -> None:
    taking_part = sum(weight != 0 for weight in weights)
    only = row.capabilities.only_adapters
    if only is not None and taking_part != only:
        raise RequestInvalid(
            f"Method {row.name!r} merges exactly {only} adapters; {taking_part} take part.",
            hint="For more adapters, `karcher` is the mean on the same sphere.",
            errors=[FieldError("/adapters", f"needs {only} items with weights other than 0")],
        )


def _check_mergeable(inputs: Sequence[MergeInput], row: MergeMethod) -> None:
    for position, item in enumerate(inputs):
        pointer = f"/adapters/{position}/id"
        if not item.mergeable:
            raise NotMergeable(
                f"Adapter {item.id} ({item.name}) of type {item.method!r} can not be merged by its factors: "
                f"{item.refusal}",
                hint="Convert it to a plain LoRA first: POST /adapters/{id}/convert."
                if item.method in CONVERTIBLE
                else "No conversion to a plain LoRA is known for this type.",
                errors=[FieldError(pointer, item.refusal or "not mergeable")],
            )
        if not row.capabilities.lora_bias and any(module.bias_key for module in item.modules):
            raise NotMergeable(
                f"Adapter {item.id} ({item.name}) has biases on lora_B, which method {row.name!r} can not merge.",
                hint="The methods `cat` and `linear` sum such biases exactly.",
                errors=[FieldError(pointer, "has lora_bias")],
            )


def _base_compatibility(inputs: Sequence[MergeInput], minimum: Level | None) -> tuple[Level, list[str]]:
    """The weakest level over all pairs. Comparing each with each matters: proofs are not transitive."""
    level: Level = "weights"
    warnings: list[str] = []
    for position, item in enumerate(inputs):
        for other in range(position):
            comparison = compare(inputs[other].base, item.base)
            pair = f"{inputs[other].name} ({inputs[other].base.name}) and {item.name} ({item.base.name})"
            pointer = [FieldError(f"/adapters/{position}/id", f"base model {item.base.name}")]
            if not comparison.reaches(minimum):
                raise BaseMismatch(
                    f"{pair}: that they share a base model is proven to the level {comparison.level!r} only; "
                    f"minimum_compatibility asks for {minimum!r}.",
                    errors=pointer,
                )
            if comparison.contradiction and minimum is None:
                raise BaseMismatch(
                    f"{pair} belong to different base models: {comparison.contradiction}.",
                    hint="If you know that they fit each other, set parameters.minimum_compatibility to 'architecture' "
                    "or 'shape'.",
                    errors=pointer,
                )
            if comparison.contradiction:
                warnings.append(f"base_models_differ: {pair}: {comparison.contradiction}.")
            level = min(level, comparison.level, key=lambda found: STRENGTH[found])
    if level == "shape":
        names = sorted({item.base.name for item in inputs})
        warnings.append(
            f"compatibility_shape_only: nothing but names and shapes shows that the adapters share a base model "
            f"({', '.join(names)}); register the base model and upload with base_model to have it proven."
        )
    return level, warnings


def _align(
    inputs: Sequence[MergeInput], weights: Sequence[float], options: MergeOptions
) -> tuple[tuple[PlannedModule, ...], tuple[str, ...]]:
    """Group the inputs' modules by path. An input of weight 0 takes no part."""
    owners: dict[str, list[tuple[int, LoraModule]]] = {}
    taking_part = [position for position, weight in enumerate(weights) if weight != 0]
    for position in taking_part:
        for module in inputs[position].modules:
            owners.setdefault(module.path, []).append((position, module))
    _check_shapes(inputs, owners)
    partial = sorted(path for path, items in owners.items() if len(items) < len(taking_part))
    if partial and options.missing_modules == "error":
        raise MergeRefused(
            f"{len(partial)} modules are not in every adapter: {_some(partial)}.",
            hint="Set missing_modules to 'union' or 'intersection'.",
            errors=[FieldError("/parameters/missing_modules", path) for path in partial[:NAMED_OFFENDERS]],
        )
    dropped = tuple(partial) if options.missing_modules == "intersection" else ()
    kept = sorted(owners.keys() - set(dropped))
    if not kept:
        raise MergeRefused(
            "The adapters have no module in common.",
            hint="Set missing_modules to 'union' to merge each module over the adapters that have it.",
            errors=[FieldError("/parameters/missing_modules", "nothing is left to merge")],
        )
    return tuple(PlannedModule(path, tuple(owners[path])) for path in kept), dropped


def _geometry(module: LoraModule) -> tuple[object, ...]:
    """What must agree between two adapters of one module: all dimensions but the rank."""
    return module.kind, module.d_out, module.d_in, module.a_shape[1:], module.b_shape[2:]


def _check_shapes(inputs: Sequence[MergeInput], owners: Mapping[str, Sequence[tuple[int, LoraModule]]]) -> None:
    offenders = []
    for path, items in sorted(owners.items()):
        if len({_geometry(module) for _, module in items}) > 1:
            shapes = "; ".join(f"{inputs[i].name}: {m.kind} {m.d_out}×{m.d_in}" for i, m in items)
            offenders.append(FieldError(path, shapes))
    if offenders:
        raise ShapeMismatch(
            f"{len(offenders)} modules have other dimensions in one adapter than in another: "
            f"{_some([f'{item.pointer} ({item.message})' for item in offenders])}.",
            hint="Adapters of different base models can not be merged.",
            errors=offenders[:NAMED_OFFENDERS],
        )


def _coverage_warnings(inputs: Sequence[MergeInput], modules: Sequence[PlannedModule]) -> list[str]:
    partial = [item.path for item in modules if len(item.owners) < len(inputs)]
    if not partial:
        return []
    return [
        f"modules_not_in_every_adapter: {len(partial)} of {len(modules)} modules have fewer owners: {_some(partial)}."
    ]


def _padding_warnings(modules: Sequence[PlannedModule], row: MergeMethod, options: MergeOptions) -> list[str]:
    """Raises MergeRefused where factors of unequal ranks would be added, unless they may be padded."""
    allowed = getattr(options, "unequal_ranks", None)
    unequal = [item.path for item in modules if len({module.rank for _, module in item.owners}) > 1]
    if allowed is None or not unequal:
        return []
    if allowed == "error":
        raise MergeRefused(
            f"Method {row.name!r} adds the factors of the adapters, whose ranks differ in {len(unequal)} modules: "
            f"{_some(unequal)}.",
            hint="Set unequal_ranks to 'pad', or use a method that works on the deltas, such as `svd` or `core_space`.",
            errors=[FieldError("/parameters/unequal_ranks", path) for path in unequal[:NAMED_OFFENDERS]],
        )
    found = f"{len(unequal)} of {len(modules)} modules"
    return [f"ranks_padded: in {found} the factors of smaller adapters were padded with zeros: {_some(unequal)}."]


def _output_rank(options: MergeOptions, modules: Sequence[PlannedModule], method: str) -> int:
    """The rank of the written adapter. Methods without an option `rank` have one of their own; "exact" is Σ rᵢ."""
    largest = max(item.rank_sum for item in modules)
    if options.beyond_span:
        largest = max(min(item.first.d_out, item.first.d_in) for item in modules)
    asked = getattr(options, "rank", options.default_rank)
    if asked == "exact":
        return largest
    if asked in ("r", "2r"):
        multiple = max(module.rank for item in modules for _, module in item.owners) * (2 if asked == "2r" else 1)
        return min(multiple, largest)
    rank = int(asked)
    if rank > largest:
        limit = "the smaller side" if options.beyond_span else "the sum of the adapters' ranks"
        raise RankOutOfRange(
            f"rank {rank} is above {limit} of every module; the largest is {largest}.",
            hint=f"Ask for at most {largest}, or use method 'cat', which gives the exact sum at that rank."
            if method != "cat"
            else None,
            errors=[FieldError("/parameters/rank", f"must be at most {largest}")],
        )
    return rank
