"""From names in a file to modules of a model: which architecture has them, and whether their sides are the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from artifacts.formats import architectures
from artifacts.formats.architectures import Architecture, Named, Target
from artifacts.formats.protocol import DENOISER, LANGUAGE_MODEL, Place, Reader
from artifacts.safetensors_header import TensorInfo

_FLUX = ("flux", "chroma")


@dataclass(slots=True)
class Stem:
    """All tensors of one module in the file. `d_out`, `d_in` are of its ΔW, 0 where the tensors do not tell."""

    name: str
    reader: Reader
    place: Place
    parts: dict[str, TensorInfo] = field(default_factory=dict)
    adapter: str = ""
    d_out: int = 0
    d_in: int = 0


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a stem means.

    Attributes:
        paths: modules, with their component, in order of the rows of a fused projection.
        shares: rows of each in the stored model, by which the rows are split; empty for one module.
        swap: the two halves of the rows change places.
        note: how the name was converted, or why it was not; "" if the name is the path.
    """

    paths: tuple[str, ...]
    shares: tuple[int, ...] = ()
    swap: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Resolution:
    """`unknown`: stem → why no module can be told. `misfits`: stem → how its sides differ from the architecture's."""

    found: Mapping[str, Resolved]
    unknown: Mapping[str, str]
    misfits: Mapping[str, str]
    architecture: str | None
    warnings: tuple[str, ...]


def resolve(stems: Sequence[Stem], metadata: Mapping[str, str]) -> Resolution:
    """Find the modules of all stems. Components are looked at one by one, since each is a model of its own."""
    groups: dict[str, list[Stem]] = defaultdict(list)
    for stem in stems:
        groups[_group(stem.place.component)].append(stem)
    hint = architectures.hint_of(metadata)
    chosen: dict[str, Architecture | None] = {}
    for component, members in groups.items():
        known = architectures.choose([_named(stem) for stem in members], _candidates(component), hint)
        chosen[component] = None if known is not None and _is_another(known, members) else known
    denoiser = chosen.get(DENOISER) or chosen.get("unet")
    found: dict[str, Resolved] = {}
    unknown: dict[str, str] = {}
    misfits: dict[str, str] = {}
    warnings: list[str] = []
    for component, members in groups.items():
        known = chosen[component]
        _resolve_group(members, known, denoiser, found, unknown)
        if known is not None:
            misfits |= _misfits([stem for stem in members if stem.name in found], known, warnings)
            strange = [stem.name for stem in members if stem.name in found and _find(known, stem.place) is None]
            if strange:
                warnings.append(
                    f"{len(strange)} modules are none of {known.title}; they keep their names, as {strange[0]!r} does."
                )
    name = None if denoiser is None else denoiser.name
    if name is None and not any(_group(part) == DENOISER for part in groups):
        name = next((known.name for known in chosen.values() if known is not None), None)
    return Resolution(found, unknown, misfits, name, tuple(warnings))


def _is_another(known: Architecture, members: Sequence[Stem]) -> bool:
    """Whether most names are none of the architecture's and mean something without it: then it is another model, which
    has a few names in common with this one."""
    strange = sum(_find(known, stem.place) is None for stem in members if stem.place.kept)
    return 2 * strange > len(members)


def _candidates(component: str) -> Sequence[str]:
    if component == LANGUAGE_MODEL:
        return ()
    if component == "unet":
        return architectures.UNETS
    return architectures.TEXT_ENCODERS if component.startswith("text_encoder") else architectures.DENOISERS


def _group(component: str) -> str:
    return DENOISER if component in ("transformer", "transformer_2", DENOISER) else component


def _named(stem: Stem) -> Named:
    return Named(stem.place.name, stem.place.flat, stem.d_out, stem.d_in)


def _resolve_group(
    members: Sequence[Stem],
    known: Architecture | None,
    denoiser: Architecture | None,
    found: dict[str, Resolved],
    unknown: dict[str, str],
) -> None:
    for stem in members:
        target = None if known is None else _find(known, stem.place)
        if target is not None and known is not None:
            component = _component(stem.place.component, known, denoiser)
            found[stem.name] = _resolved(stem, known, target, component)
        elif stem.place.kept:
            note = "" if known is None else f"{known.title} has no module of this name; it was kept as it is"
            found[stem.name] = Resolved((stem.place.kept,), note=note)
        elif known is None:
            unknown[stem.name] = "no stored architecture has a module of this name"
        else:
            unknown[stem.name] = f"{known.title} has no module of this name"


def _find(known: Architecture, place: Place) -> Target | None:
    target = known.find(place.name, flat=place.flat)
    if target is None and known.component == "text_encoder" and not place.flat:
        target = known.find(f"text_model.{place.name}", flat=False)
    return target


def _component(component: str, known: Architecture, denoiser: Architecture | None) -> str:
    if component == "text_encoder_3" and denoiser is not None and denoiser.name in _FLUX:
        return "text_encoder_2"  # trainers number T5 as Stable Diffusion 3 does; FLUX has no third encoder
    return component or known.component


def _resolved(stem: Stem, known: Architecture, target: Target, component: str) -> Resolved:
    paths = tuple(f"{component}.{path}" for path in target.paths)
    shares = tuple(known.modules[path][0] for path in target.paths) if len(paths) > 1 else ()
    notes = []
    if len(paths) > 1:
        notes.append(f"its rows were split into {len(paths)} modules")
    if target.swap:
        notes.append("the halves of its rows were exchanged, (shift, scale) being (scale, shift) in diffusers")
    if stem.place.flat:
        notes.insert(0, f"the path is from the list of modules of {known.title}")
    elif stem.place.name not in target.paths:
        notes.insert(0, f"the name is of the first implementation of {known.title}")
    return Resolved(paths, shares, target.swap, "; ".join(notes))


def _misfits(members: Sequence[Stem], known: Architecture, warnings: list[str]) -> dict[str, str]:
    """Stems whose sides contradict the architecture.

    A narrower or wider model of the same names is not one: there every side that was 3072 is, say, 384.
    """
    pairs: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    seen: dict[int, Counter[int]] = defaultdict(Counter)
    for stem in members:
        target = _find(known, stem.place)
        if target is None or stem.d_out == 0 or stem.d_in == 0:
            continue
        expected = architectures.sides(known, target)
        pairs[stem.name] = ((stem.d_out, stem.d_in), expected)
        if len(target.paths) == 1:
            for actual, wanted in zip((stem.d_out, stem.d_in), expected, strict=True):
                seen[wanted][actual] += 1
    if all(actual == wanted for actual, wanted in pairs.values()):
        return {}
    meant = {wanted: _meant(counts, wanted) for wanted, counts in seen.items()}
    wrong = {}
    for name, (sides, expected) in pairs.items():
        if any(meant.get(side, found) != found for found, side in zip(sides, expected, strict=True)):
            wrong[name] = f"ΔW is {sides[0]}×{sides[1]}, the module of {known.title} is {expected[0]}×{expected[1]}"
    other = [f"{wanted} is {actual}" for wanted, actual in sorted(meant.items()) if wanted != actual]
    if other:
        changed = ", ".join(other)
        warnings.append(f"The names are those of {known.title}, the sides are not ({changed}): another size of it?")
    return wrong


def _meant(counts: Counter[int], wanted: int) -> int:
    """What a side of the model is in the file: what it is most often, and of equally common ones the model's own."""
    return max(counts, key=lambda actual: (counts[actual], actual == wanted))
