"""The table of readers. A key belongs to the first reader that knows its name."""

from __future__ import annotations

from collections.abc import Iterable

from artifacts.formats.animatediff import AnimateDiff
from artifacts.formats.attention_processors import AttentionProcessors
from artifacts.formats.bare import Bare
from artifacts.formats.bfl import BlackForestLabs
from artifacts.formats.comfy import Comfy
from artifacts.formats.diffusers import Diffusers
from artifacts.formats.kohya import Kohya
from artifacts.formats.mistral import Mistral
from artifacts.formats.mlx import MLX
from artifacts.formats.onetrainer import OneTrainer
from artifacts.formats.protocol import ConfiguredReader, Reader
from artifacts.formats.roles import WEAK, part_of
from artifacts.formats.torchtune import TorchTune
from artifacts.formats.xlabs import XLabs

READERS: tuple[Reader, ...] = (
    Kohya(),
    OneTrainer(),
    XLabs(),
    AnimateDiff(),
    AttentionProcessors(),
    Comfy(),
    Diffusers(),
    BlackForestLabs(),
    MLX(),
    TorchTune(),
    Mistral(),
    Bare(),
)
"""Specific names before general ones: `Bare` takes every dotted name."""


def is_reader(name: str) -> bool:
    """Whether a format of that name is read here."""
    return any(reader.name == name for reader in READERS)


def configured_reader(keys: Iterable[str]) -> ConfiguredReader | None:
    """The reader of the first key that only adapters have, if a file beside the weights tells the scaling to it."""
    for key in keys:
        part = part_of(key)
        if part is None or part.role in WEAK:
            continue
        found = next((reader for reader in READERS if reader.place(part.stem, part.role) is not None), None)
        return found if isinstance(found, ConfiguredReader) else None
    return None
