"""What a writer is: it says an adapter's modules in the names of one format, or why that format can not hold them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

from artifacts.errors import FieldError, RequestInvalid
from artifacts.formats import architectures
from artifacts.formats.architectures import Architecture, Target
from artifacts.formats.pairs import Block, Pair
from artifacts.formats.protocol import COMPONENTS
from artifacts.manifest import AdapterManifest, LoraModule
from artifacts.served_ranks import check_rank

POINTER = "/query/format"
_KEPT = "kept in the stored file"
_MOST_OPERATIONS = 5e11
"""What a request may spend on cutting ranks: some tens of seconds of one core."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A module: its path inside a component ("unet" …; "" for a model that is no part of a pipeline)."""

    component: str
    path: str
    module: LoraModule


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter to be written: plain pairs of factors, placed.

    Attributes:
        limit: the largest rank of the result; None keeps every rank.
        base_config: config.json of the base model, where it is known.
    """

    manifest: AdapterManifest
    placed: tuple[Placed, ...]
    architecture: Architecture | None
    limit: int | None = None
    base_config: Mapping[str, Any] | None = None

    def parts(self) -> Mapping[str, tuple[Placed, ...]]:
        """Component → its modules."""
        groups: dict[str, list[Placed]] = defaultdict(list)
        for item in self.placed:
            groups[item.component].append(item)
        return {component: tuple(items) for component, items in sorted(groups.items())}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written: pairs, strings for the file's metadata, the configuration of formats that have one, and
    the values of a GGUF file's header."""

    pairs: tuple[Pair, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str | float] = field(default_factory=dict)


class Writer(Protocol):
    """One format that adapters are handed out in."""

    name: str
    """What the format is called in requests."""

    def plan(self, subject: Subject) -> Plan:
        """Raises RequestInvalid: the format can not hold the adapter; at `POINTER`, and it says why."""
        ...


def subject_of(
    manifest: AdapterManifest, name: str, limit: int | None, base_config: Mapping[str, Any] | None = None
) -> Subject:
    """The adapter, if it is nothing but pairs of factors.

    Args:
        name: of the format that it is for.
        base_config: config.json of the base model, where it is known.

    Raises:
        RequestInvalid: the adapter holds what that format can not say, or cutting it takes too long for a request.
    """
    modules = manifest.modules
    if not manifest.mergeable or manifest.report.facts.typed or not modules:
        refuse(name, manifest.refusal or "it has no pairs of factors")
    blocks = [module.path for module in modules if module.block_key is not None]
    if blocks:
        refuse(name, f"{len(blocks)} modules are blocks of MiSS, for instance {blocks[0]}")
    biased = [module.path for module in modules if module.bias_key is not None]
    if biased:
        refuse(name, f"{len(biased)} modules have a bias, for instance {biased[0]}")
    kept = [item.key for item in manifest.report.ignored if item.reason.endswith(_KEPT)]
    if kept:
        refuse(name, f"{len(kept)} tensors besides the factors belong to it, for instance {kept[0]}")
    if limit is not None:
        modules = _limited(manifest, limit)
    known = _architecture(manifest)
    placed = tuple(_place(module, known) for module in modules)
    nested = manifest.report.nested is not None
    return Subject(manifest, placed, known, None if nested else limit, base_config)


def refuse(name: str, reason: str, hint: str | None = None) -> NoReturn:
    """Raise that the format `name` can not hold the adapter."""
    raise RequestInvalid(
        f"The adapter can not be written as {name}: {reason}.",
        hint=hint
        or "format=safetensors hands out what is stored; POST /adapters/{id}/convert makes some types a LoRA.",
        errors=[FieldError(POINTER, f"{name} can not hold it: {reason}")],
    )


def check_cost(pairs: Iterable[Pair]) -> None:
    """Raises RequestInvalid: cutting these pairs takes too long for a request."""
    if sum(pair.cost() for pair in pairs) > _MOST_OPERATIONS:
        raise RequestInvalid(
            "To cut an adapter of this size takes too long for a download.",
            hint='Make it a job: POST /merge with this adapter alone, method "svd" and the rank.',
            errors=[FieldError("/query/rank", "too much to compute in a request")],
        )


def _limited(manifest: AdapterManifest, limit: int) -> tuple[LoraModule, ...]:
    """The modules, of an adapter of several ranks those at the rank `limit`.

    Raises:
        RequestInvalid: a rank that the adapter does not have.
    """
    if manifest.report.nested is not None:
        nested = check_rank(manifest.report.nested, limit, "/query/rank")
        return tuple(_first(module, limit, nested.alpha_at(limit, module.alpha)) for module in manifest.modules)
    if limit > manifest.rank:
        raise RequestInvalid(
            f"The adapter's rank is {manifest.rank}.",
            errors=[FieldError("/query/rank", f"must be at most {manifest.rank}")],
        )
    if manifest.report.nonfinite:
        raise RequestInvalid(
            "The adapter holds NaN or infinite numbers: no smaller rank can be computed.",
            errors=[FieldError("/query/rank", "the adapter is not finite")],
        )
    return manifest.modules


def _first(module: LoraModule, rank: int, alpha: float) -> LoraModule:
    """The first components of a module, as they were trained."""
    return replace(
        module,
        rank=rank,
        alpha=alpha,
        scaling=alpha / rank,
        rank_span=(0, rank),
        a_shape=(rank, *module.a_shape[1:]),
        b_shape=(module.b_shape[0], rank, *module.b_shape[2:]),
    )


def _architecture(manifest: AdapterManifest) -> Architecture | None:
    name = manifest.report.facts.architecture
    return None if name is None else architectures.architecture(name)


def _place(module: LoraModule, known: Architecture | None) -> Placed:
    component, dot, rest = module.path.partition(".")
    if dot and component in COMPONENTS and not _of_language_model(component, rest):
        return Placed(component, _with_level(component, rest), module)
    return Placed(known.component if known is not None else "", module.path, module)


def _of_language_model(component: str, rest: str) -> bool:
    return component == "transformer" and rest.startswith(("h.", "encoder.layers."))


def _with_level(component: str, path: str) -> str:
    """CLIP's paths with the level that older releases of transformers have, and all formats."""
    if component.startswith("text_encoder") and path.startswith(("encoder.layers.", "embeddings.")):
        return f"text_model.{path}"
    return path


def pair_of(
    blocks: Sequence[Block], names: tuple[str, str, str], subject: Subject, *, swap: bool = False, fold: bool = False
) -> Pair:
    """The pair of these blocks; `names` of A, B and alpha. With `fold` the format knows no scaling."""
    like = next(block.module for block in blocks if block.module is not None)
    tail = () if like.kind != "conv" else like.b_shape[2:]
    a_tail = like.a_shape[1:] if like.kind == "conv" or len(blocks) == 1 else (math.prod(like.a_shape[1:]),)
    told = 1.0 if fold else None
    return Pair(names[0], names[1], tuple(blocks), a_tail, tail, names[2], swap=swap, told=told, limit=subject.limit)


def single(item: Placed) -> tuple[Block, ...]:
    """One module as the only block of a pair."""
    return (Block(item.module.d_out, item.module),)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Modules under one name of a model's first implementation."""

    name: str
    blocks: tuple[Block, ...]
    swap: bool = False


def in_native_names(name: str, items: Sequence[Placed], known: Architecture) -> tuple[Grouped, ...]:
    """The modules under the names of the first implementation, projections that it has fused together.

    Raises:
        RequestInvalid: a module is not one of the architecture, or what is fused does not fit together.
    """
    names, paths = _native_names(known), {item.path: item for item in items}
    groups: dict[str, Target] = {}
    for path in paths:
        if path not in known.modules:
            refuse(name, f"{known.title} has no module {path!r}")
        native = names.get(path, path)
        groups[native] = known.dotted[native]
    return tuple(_grouped(name, native, target, paths, known) for native, target in sorted(groups.items()))


def _grouped(name: str, native: str, target: Target, paths: Mapping[str, Placed], known: Architecture) -> Grouped:
    there = {path: paths[path].module for path in target.paths if path in paths}
    if len(target.paths) == 1:
        module = there[target.paths[0]]
        if target.swap and module.d_out % 2:
            refuse(name, f"the {module.d_out} rows of {module.path} have no halves")
        return Grouped(native, (Block(module.d_out, module),), target.swap)
    if any(module.kind != "linear" for module in there.values()) or len({m.d_in for m in there.values()}) != 1:
        refuse(name, f"{', '.join(there)} do not fit together as {native}")
    # a smaller model of the same names has other sides in the same proportion
    path, module = next(iter(there.items()))
    unit = known.modules[path][0]
    blocks = []
    for part in target.paths:
        rows = there[part].d_out if part in there else known.modules[part][0] * module.d_out // unit
        blocks.append(Block(rows, there.get(part)))
    whole, shares = sum(block.rows for block in blocks), [known.modules[part][0] for part in target.paths]
    if any(block.rows * sum(shares) != whole * share for block, share in zip(blocks, shares, strict=True)):
        sides = " + ".join(str(block.rows) for block in blocks)
        refuse(name, f"the rows of {native}, {sides}, are not in the proportion of {known.title}")
    return Grouped(native, tuple(blocks), target.swap)


def _native_names(known: Architecture) -> Mapping[str, str]:
    """Path → its name in the first implementation: of several names the one with most levels, no processor's."""
    found: dict[str, str] = {}
    for name, target in known.dotted.items():
        if ".processor." in name or target.paths == (name,):
            continue
        for path in target.paths:
            if path not in found or name.count(".") > found[path].count("."):
                found[path] = name
    return found
