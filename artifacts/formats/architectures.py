"""The stored lists of modules of known base models: what turns a flattened or a foreign name into a module's path.

`scripts/make_architectures.py` writes them from the models' configurations.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "architectures"
_SWAP = "swap"

UNETS = ("sd1", "sd2", "sdxl", "animatediff")
DENOISERS = (
    *UNETS,
    "flux",
    "sd3",
    "sd35-medium",
    "sd35-large",
    "wan21-1.3b",
    "wan-14b",
    "wan-14b-i2v",
    "wan22-5b",
    "qwen-image",
    "hunyuan-video",
    "framepack",
    "z-image",
    "flux2",
    "flux2-klein-9b",
    "flux2-klein-4b",
    "chroma",
    "ltx-video",
    "ltx-2",
    "lumina2",
    "hidream",
    "auraflow",
    "cogvideox-2b",
    "cogvideox-5b",
    "cogview4",
    "mochi",
    "sana",
    "pixart",
    "krea2",
    "anima",
)
"""In order of how common their adapters are, which decides between lists that fit equally well."""
TEXT_ENCODERS = ("clip-l", "clip-h", "clip-bigg", "t5-xxl", "qwen3-0.6b")

_HINTS = {
    "stable-diffusion-v1": "sd1",
    "sd_v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "sd_v2": "sd2",
    "stable-diffusion-xl": "sdxl",
    "sdxl_": "sdxl",
    "stable-diffusion-3": "sd3",
    "sd3": "sd3",
    "flux-1": "flux",
    "flux1": "flux",
    "flux.1": "flux",
    "flux-2": "flux2",
    "flux.2": "flux2",
    "wan2": "wan",
    "qwen-image": "qwen-image",
    "hunyuan-video": "hunyuan-video",
    "framepack": "framepack",
    "z-image": "z-image",
    "chroma": "chroma",
    "lumina": "lumina2",
}
"""Beginnings of `modelspec.architecture` and `ss_base_model_version`."""
_SPECIFIED = {
    "sd1": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "sd35-medium": "stable-diffusion-3-5-medium",
    "sd35-large": "stable-diffusion-3-5-large",
    "flux": "flux-1",
    "chroma": "chroma",
    "flux2": "Flux.2-dev",
    "flux2-klein-4b": "Flux.2-klein-4b",
    "flux2-klein-9b": "Flux.2-klein-9b",
    "wan21-1.3b": "wan2.1",
    "wan-14b": "wan2.1",
    "wan-14b-i2v": "wan2.1",
    "hunyuan-video": "hunyuan-video",
    "framepack": "framepack",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "lumina2": "lumina-2",
}
"""How sd-scripts and musubi-tuner call the models in `modelspec.architecture` (github.com/Stability-AI/ModelSpec)."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a name means: modules of diffusers in order of their rows; `swap`: the two halves of rows change places."""

    paths: tuple[str, ...]
    swap: bool = False


@dataclass(frozen=True)
class Architecture:
    """One base model. `modules`: path → shape of the weight. `dotted`, `flat`: name → what it means."""

    name: str
    title: str
    component: str
    modules: Mapping[str, tuple[int, ...]]
    dotted: Mapping[str, Target]
    flat: Mapping[str, Target]

    def find(self, name: str, *, flat: bool) -> Target | None:
        """The modules that a name means, or None."""
        return (self.flat if flat else self.dotted).get(name)


@cache
def architecture(name: str) -> Architecture:
    """The stored list of that name."""
    document = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    native = {
        key: Target(tuple(path for path in paths if path != _SWAP), _SWAP in paths)
        for key, paths in document["native"].items()
    }
    dotted = native | {path: Target((path,)) for path in document["modules"]}
    flat = {key.replace(".", "_"): target for key, target in dotted.items()}
    modules = {path: tuple(shape) for path, shape in document["modules"].items()}
    return Architecture(document["name"], document["title"], document["component"], modules, dotted, flat)


def specified(known: Architecture | None) -> dict[str, str]:
    """What the metadata of a file tell of the model that it is for; nothing where trainers have no name for it.

    Without it a few layers of FLUX.2 may be read as FLUX.1's, which have the same names and sides.
    """
    name = None if known is None else _SPECIFIED.get(known.name)
    return {} if name is None else {"modelspec.architecture": f"{name}/lora"}


def hint_of(metadata: Mapping[str, str]) -> str | None:
    """The beginning of an architecture's name that a file's metadata names, if it does."""
    for field in ("modelspec.architecture", "ss_base_model_version"):
        value = metadata.get(field, "").lower()
        for start, name in _HINTS.items():
            if value.startswith(start):
                return name
    return None


@dataclass(frozen=True, slots=True)
class Named:
    """A name in a file with the sides of its ΔW, (0, 0) where they are not known."""

    name: str
    flat: bool
    d_out: int = 0
    d_in: int = 0


def choose(names: Sequence[Named], candidates: Iterable[str], hint: str | None = None) -> Architecture | None:
    """The list that has most of the names; among those, the one whose shapes fit most; None if none has any."""
    best: tuple[int, int, bool] = (0, 0, False)
    found = None
    for candidate in candidates:
        known = architecture(candidate)
        targets = [known.find(item.name, flat=item.flat) for item in names]
        hits = sum(target is not None for target in targets)
        if hits == 0 or hits < best[0]:
            continue
        fits = sum(
            target is not None and fit(known, target, item.d_out, item.d_in)
            for target, item in zip(targets, names, strict=True)
        )
        score = (hits, fits, hint is not None and candidate.startswith(hint))
        if score > best:
            best, found = score, known
    return found


def sides(known: Architecture, target: Target) -> tuple[int, int]:
    """(d_out, d_in) of the module, or of the fused modules together, with a convolution's kernel in d_in."""
    shapes = [known.modules[path] for path in target.paths]
    d_in = 1
    for size in shapes[0][1:]:
        d_in *= size
    return sum(shape[0] for shape in shapes), d_in


def fit(known: Architecture, target: Target, d_out: int, d_in: int) -> bool:
    """Whether a ΔW of these sides is one of the module's; true where they are not known."""
    return d_out == 0 or (d_out, d_in) == sides(known, target)
