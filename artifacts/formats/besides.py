"""Tensors that stand beside an adapter's own: what may change a weight is never passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from artifacts.formats.modules import FACTORED_ROLES, PAIR_ROLES, Parts, is_lora, type_of
from artifacts.formats.resolution import Stem
from artifacts.formats.roles import ALPHA, part_of

_FULL = ("weight", "bias")
MAX_NAMES = 20


def is_adapted(stem: Stem) -> bool:
    """Whether the tensors of a stem change a module."""
    return is_lora(stem.parts) or type_of(stem.parts) is not None


def besides(
    stems: Iterable[Stem], found: Iterable[str], unplaced: Iterable[str], clean: Callable[[str], str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(why they keep the adapter from being merged, what the uploader should know).

    Args:
        found: names of the stems whose modules are known.
        unplaced: keys that are of no stem.
        clean: a key → it without what wrappers left in it, as the stems' names are.
    """
    loose, beside, known, adapted = list(unplaced), [], set(found), set()
    for stem in stems:
        if not is_adapted(stem):
            loose += [info.name for info in stem.parts.values()]
            continue
        adapted.add(stem.name)
        own = _own_roles(stem.parts)
        if stem.name in known and own is not None:
            beside += [info.name for role, info in stem.parts.items() if role not in own]
    near = {key for key in loose if _is_below(clean(key), adapted)}
    beside += [key for key in loose if key in near]
    loose = [key for key in loose if key not in near]
    full = [key for key in loose if (part := part_of(key)) is not None and part.role in _FULL]
    reasons, warnings = [], []
    if beside:
        reasons.append(f"{len(beside)} tensors stand beside factors and are not understood: {beside[0]!r}")
    if full:
        reasons.append(f"{len(full)} weights of the base are stored in full, for instance {full[0]!r}")
    alphas = [key for key in loose if (part := part_of(key)) is not None and part.role == ALPHA]
    others = [key for key in loose if (part := part_of(key)) is None or part.role not in (ALPHA, *_FULL)]
    if alphas:
        warnings.append(f"{len(alphas)} alphas stand without factors and are ignored: {_listed(alphas)}.")
    if others:
        warnings.append(f"{len(others)} tensors are no part of an adapter and are ignored: {_listed(others)}.")
    return tuple(reasons), tuple(warnings)


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
