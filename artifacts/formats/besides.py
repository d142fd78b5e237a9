"""Tensors that stand beside an adapter's own: what may change a weight is never passed over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from artifacts.formats.modules import FACTORED_ROLES, PAIR_ROLES, Parts, is_lora, type_of
from artifacts.formats.resolution import Stem
from artifacts.formats.roles import ALPHA, BUFFERS, part_of
from artifacts.peft_keys import FLOATS
from artifacts.safetensors_header import TensorInfo

_FULL = ("weight", "bias")
_Kind = Literal["full", "alpha", "parameter", "rest"]
MAX_NAMES = 20


def is_adapted(stem: Stem) -> bool:
    """Whether the tensors of a stem change a module."""
    return is_lora(stem.parts) or type_of(stem.parts) is not None


def besides(
    stems: Iterable[Stem], found: Iterable[str], unplaced: Iterable[TensorInfo], clean: Callable[[str], str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(why they keep the adapter from being merged, what the uploader should know).

    Args:
        found: names of the stems whose modules are known.
        unplaced: tensors that are of no stem. Those under a name of the model that is adapted may be parameters of it.
        clean: a key → it without what wrappers left in it, as the stems' names are.
    """
    others, beside, known, adapted = list(unplaced), [], set(found), set()
    for stem in stems:
        if not is_adapted(stem):
            others += stem.parts.values()
            continue
        adapted.add(stem.name)
        own = _own_roles(stem.parts)
        if stem.name in known and own is not None:
            beside += [info.name for role, info in stem.parts.items() if role not in own]
    tops = {name.partition(".")[0] for name in adapted if "." in name}
    kinds: dict[_Kind, list[str]] = defaultdict(list)
    for info in others:
        name = clean(info.name)
        if _is_below(name, adapted):
            beside.append(info.name)
        else:
            kinds[_kind_of(info, name.partition(".")[0] in tops)].append(info.name)
    reasons, warnings = [], []
    if beside:
        reasons.append(f"{len(beside)} tensors stand beside factors and are not understood: {beside[0]!r}")
    if full := kinds["full"]:
        reasons.append(f"{len(full)} weights of the base are stored in full, for instance {full[0]!r}")
    if parameters := kinds["parameter"]:
        reasons.append(f"{len(parameters)} tensors may change what no adapted module has: {parameters[0]!r}")
    if alphas := kinds["alpha"]:
        warnings.append(f"{len(alphas)} alphas stand without factors and are ignored: {_listed(alphas)}.")
    if rest := kinds["rest"]:
        warnings.append(f"{len(rest)} tensors are no part of an adapter and are ignored: {_listed(rest)}.")
    return tuple(reasons), tuple(warnings)


def _kind_of(info: TensorInfo, in_model: bool) -> _Kind:
    """Args: in_model: the name begins as those of adapted modules do."""
    part = part_of(info.name)
    if part is not None and part.role in _FULL:
        return "full"
    if part is not None and part.role == ALPHA:
        return "alpha"
    is_buffer = info.dtype not in FLOATS or info.name.rpartition(".")[2] in BUFFERS
    return "parameter" if in_model and not is_buffer else "rest"


def _own_roles(parts: Parts) -> frozenset[str] | None:
    """What a module's tensors may be; None of a type whose other tensors are its own."""
    return PAIR_ROLES if is_lora(parts) else FACTORED_ROLES.get(type_of(parts) or "")


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys[:MAX_NAMES])) + (", …" if len(keys) > MAX_NAMES else "")


def _is_below(name: str, adapted: set[str]) -> bool:
    """Whether a name is below that of an adapted module."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in adapted:
            return True
    return False
