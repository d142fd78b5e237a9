"""Adapters of cloneofsimo/lora, whose layers are numbered and not named, under the names that diffusers has for them.

`unet:0:up` is the first linear layer inside of attention (and GEGLU) modules, in the order in which the model of that
day had them; releases of diffusers differ in it. A number is turned into a name only where exactly one order fits the
shapes of all layers. The scaling is 1, as that library saves it (lora_diffusion/lora.py, save_safeloras).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from artifacts.errors import FileBroken, FormatUnknown
from artifacts.formats import architectures
from artifacts.formats.architectures import Architecture
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME
from artifacts.renaming import rename_tensors
from artifacts.safetensors_header import MAX_HEADER_BYTES, SafetensorsHeader, TensorInfo, read_header

_KEY = re.compile(r"(unet|text_encoder):(0|[1-9]\d{0,3}):(up|down)")
_MARK = b":0:up"
_MODELS = {"unet": ("sd1", "sd2"), "text_encoder": ("clip-l", "clip-h")}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
_BLOCKS = (
    ("attn1", "ff.net.0.proj", "attn2"),
    ("attn1", "attn2", "ff.net.0.proj"),
    ("attn1", "attn2"),
)
"""What a transformer block has, in the order of old and of new releases, and where GEGLU was not trained."""
_PARTS = (("down_blocks", "up_blocks", "mid_block"), ("down_blocks", "mid_block", "up_blocks"))


class _Layer(NamedTuple):
    up: TensorInfo
    down: TensorInfo

    @property
    def sides(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.up.shape[0], math.prod(self.down.shape[1:])


def name_layers(directory: Path) -> tuple[str, ...]:
    """Rename the tensors of a file of that kind in `directory`; other adapters are not touched.

    Returns:
        What was changed, in sentences; empty when nothing was.

    Raises:
        FormatUnknown: no order of a known model fits, or more than one does.
        FileBroken: a half of a pair or a number is missing, or the file is broken.
    """
    weights = directory / WEIGHTS_NAME
    if (directory / CONFIG_NAME).is_file() or not _has_mark(weights):
        return ()
    header = read_header(weights)
    components = _components(header)
    if not components:
        return ()
    names = {name: name for name in header.tensors}
    said = []
    for component, layers in components.items():
        known, paths = _order(component, layers)
        for layer, path in zip(layers, paths, strict=True):
            names[layer.up.name] = f"{component}.{path}.lora_B.weight"
            names[layer.down.name] = f"{component}.{path}.lora_A.weight"
        said.append(
            f"The {len(layers)} layers of {component} were numbered, not named (cloneofsimo/lora); their shapes fit "
            f"one order of the layers of {known.title}, by which they are named."
        )
    if len(set(names.values())) != len(names):
        raise FileBroken("The file holds layers by their numbers and by their names.")
    rename_tensors(weights, header, names)
    return tuple(said)


def _has_mark(weights: Path) -> bool:
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _MARK in file.read(min(length, MAX_HEADER_BYTES))


def _components(header: SafetensorsHeader) -> dict[str, list[_Layer]]:
    """Component → its layers by number."""
    found: dict[str, dict[int, dict[str, TensorInfo]]] = {}
    for name, info in header.tensors.items():
        match = _KEY.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = info
    return {component: _layers(component, halves) for component, halves in sorted(found.items())}


def _layers(component: str, halves: dict[int, dict[str, TensorInfo]]) -> list[_Layer]:
    layers = []
    for number in range(len(halves)):
        there = halves.get(number, {})
        if there.keys() != {"up", "down"}:
            raise FileBroken(
                f"{component}:{number} needs up and down; the file has {', '.join(sorted(there)) or 'none'}."
            )
        layer = _Layer(there["up"], there["down"])
        if len(layer.up.shape) != 2 or len(layer.down.shape) != 2:
            raise FormatUnknown(
                f"{component}:{number} is no linear layer; convolutions that are only numbered are not read.",
                hint="Convert the file with the library that made it.",
            )
        layers.append(layer)
    return layers


def _order(component: str, layers: Sequence[_Layer]) -> tuple[Architecture, tuple[str, ...]]:
    """The model, and the paths of its layers by number."""
    sides = [layer.sides for layer in layers]
    fitting = {}
    for name in _MODELS[component]:
        known = architectures.architecture(name)
        for paths in _orders(component, known):
            if [known.modules[path][:2] for path in paths] == sides:
                fitting[paths] = known
    if len(fitting) != 1:
        kinds = "no order" if not fitting else "more than one order"
        raise FormatUnknown(
            f"The {len(layers)} layers of {component} are numbered, not named, and their shapes fit {kinds} of the "
            "layers of Stable Diffusion 1.x and 2.x.",
            hint="Convert the file with the library that made it, to a format that names its layers.",
        )
    ((paths, known),) = fitting.items()
    return known, paths


def _orders(component: str, known: Architecture) -> Iterator[tuple[str, ...]]:
    if component == "text_encoder":
        stems = dict.fromkeys(path.rpartition(".")[0] for path in known.modules if path.endswith(".self_attn.q_proj"))
        yield tuple(f"{stem}.{name}" for stem in stems for name in _CLIP)
        return
    stems = dict.fromkeys(path.partition(".attn1.")[0] for path in known.modules if ".attn1." in path)
    for parts in _PARTS:
        ordered = [stem for part in parts for stem in stems if stem.startswith(part)]
        for blocks in _BLOCKS:
            yield tuple(path for stem in ordered for block in blocks for path in _inside(f"{stem}.{block}"))


def _inside(stem: str) -> tuple[str, ...]:
    return (stem,) if stem.endswith(".proj") else tuple(f"{stem}.{name}" for name in _ATTENTION)
