"""Headers without files: names and shapes, and the numbers that a reader may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from artifacts.formats.reading import Reading, read_keys
from artifacts.peft_config import parse_config
from artifacts.safetensors_header import SafetensorsHeader
from scripts.formats_report import CorpusValues, header_of

Shapes = Mapping[str, Sequence[int]]


@pytest.fixture
def header() -> Callable[..., SafetensorsHeader]:
    """header({key: shape}, metadata=None) → the header of a file of float32 tensors."""

    def make(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> SafetensorsHeader:
        tensors = {key: ("F32", list(shape)) for key, shape in shapes.items()}
        return header_of({"tensors": tensors, "metadata": metadata or {}})

    return make


@pytest.fixture
def reading(header: Callable[..., SafetensorsHeader]) -> Callable[..., Reading]:
    """reading({key: shape}, values={key: number}, fill={"re:…": "blockdiag"}, metadata=None, configs=None)."""

    def make(
        shapes: Shapes,
        values: Mapping[str, float] | None = None,
        fill: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Reading:
        numbers = CorpusValues({"values": values or {}, "fill": fill or {}})
        parsed = {name: parse_config({"peft_type": "LORA", **fields}) for name, fields in (configs or {}).items()}
        return read_keys(header(shapes, metadata), numbers, configs=parsed)

    return make


@pytest.fixture
def pair() -> Callable[..., dict[str, list[int]]]:
    """pair("stem", d_out, d_in, rank=4, ends=("lora_down.weight", "lora_up.weight")) → shapes of a low-rank pair."""

    def make(
        stem: str,
        d_out: int,
        d_in: int,
        rank: int = 4,
        ends: tuple[str, str] = ("lora_down.weight", "lora_up.weight"),
    ) -> dict[str, list[int]]:
        return {f"{stem}.{ends[0]}": [rank, d_in], f"{stem}.{ends[1]}": [d_out, rank]}

    return make
