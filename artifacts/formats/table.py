"""The table of readers. A key belongs to the first reader that knows its name."""

from __future__ import annotations

from artifacts.formats.animatediff import AnimateDiff
from artifacts.formats.attention_processors import AttentionProcessors
from artifacts.formats.bare import Bare
from artifacts.formats.bfl import BlackForestLabs
from artifacts.formats.comfy import Comfy
from artifacts.formats.diffusers import Diffusers
from artifacts.formats.kohya import Kohya
from artifacts.formats.onetrainer import OneTrainer
from artifacts.formats.protocol import Reader
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
    Bare(),
)
"""Specific names before general ones: `Bare` takes every dotted name."""


def is_reader(name: str) -> bool:
    """Whether a format of that name is read here."""
    return any(reader.name == name for reader in READERS)
