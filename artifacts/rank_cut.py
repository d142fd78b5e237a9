"""The adapter of rank b inside one of rank r: which bytes of the file it has, and its configuration.

Of lora_A (r×d_in) the first b rows are one run of bytes, of lora_B (d_out×r) the first b columns are b elements of
every row. Nothing is computed: the adapter of rank b holds the trained numbers as they are, and its `lora_alpha` gives
the scaling that they were trained with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from artifacts.layout import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, AdapterLayout
from artifacts.manifest import LoraModule, NestedRanks
from artifacts.nested_ranks import NESTED_KEY, mark_of, nested_ranks
from artifacts.safetensors_header import SafetensorsHeader, packed_header
from artifacts.served_ranks import check_rank

_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Run:
    """The first `kept` of every `stride` bytes, `rows` times, from byte `start` of a file on."""

    start: int
    kept: int
    stride: int
    rows: int = 1

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self.kept * self.rows


@dataclass(frozen=True)
class Pieces:
    """What is kept of a file, in the order of the file."""

    runs: tuple[Run, ...]

    @cached_property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(run.size for run in self.runs)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(first byte, byte after the last) in the file of what makes up bytes `start` to `stop` of what is kept."""
        position = 0
        for run in self.runs:
            low, high = max(start - position, 0), min(stop - position, run.size)
            position += run.size
            for row in range(low // run.kept, -(-high // run.kept)) if low < high else ():
                shift = run.start + row * (run.stride - run.kept)
                yield shift + max(low, row * run.kept), shift + min(high, (row + 1) * run.kept)

    def hull(self, start: int, stop: int) -> tuple[int, int]:
        """The part of the file that has to be read for bytes `start` to `stop` of what is kept, `start` < `stop`."""
        (first, _), (last, _) = next(self.spans(start, start + 1)), next(self.spans(stop - 1, stop))
        return first, last + 1

    def sift(self, chunks: Iterable[bytes], start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of what is kept, out of `chunks`, which are the file's bytes of the hull."""
        spans = self.spans(start, stop)
        first, last = next(spans)
        position = first
        for chunk in chunks:
            end, found = position + len(chunk), []
            while first < end:
                found.append(chunk[max(first, position) - position : min(last, end) - position])
                if last > end:
                    break
                first, last = next(spans, (end, end))
            position = end
            if found:
                yield b"".join(found)


@dataclass(frozen=True, slots=True)
class RankCut:
    """The adapter of a smaller rank.

    Attributes:
        head: first bytes of its weights file; what follows are `pieces` of the whole adapter's file.
        config: its adapter_config.json.
    """

    head: bytes
    pieces: Pieces
    config: Mapping[str, Any]


def rank_cut(
    header: SafetensorsHeader,
    document: Mapping[str, Any],
    modules: Iterable[LoraModule],
    nested: NestedRanks,
    rank: int,
    *,
    with_config: bool,
) -> RankCut:
    """How to cut an adapter to one of its `nested.ranks`.

    Args:
        header: of its weights file.
        document: its configuration.
        with_config: put the configuration into the metadata of the file, where it is put anyway if it was there.
    """
    config = dict(document) | {"r": rank, "lora_alpha": nested.alpha_at(rank, float(document.get("lora_alpha", 8)))}
    metadata = dict(header.metadata) | {NESTED_KEY: mark_of(nested.up_to(rank))}
    metadata.setdefault("format", "pt")
    if with_config or METADATA_KEY in metadata:
        metadata[METADATA_KEY] = json.dumps(config, sort_keys=True)
    sides = {key: place for module in modules for place, key in enumerate((module.a_key, module.b_key))}
    entries: dict[str, Any] = {"__metadata__": metadata}
    runs: list[Run] = []
    position = 0
    for name, info in header.tensors.items():
        shape, size = list(info.shape), info.end - info.begin
        run = Run(info.begin, size, size)
        if name in sides:
            place = sides[name]
            kept = size // shape[place] * rank
            shape[place] = rank
            run = Run(info.begin, kept, size)
            if place == 1:
                rows = shape[0]
                run = Run(info.begin, kept // rows, size // rows, rows)
        entries[name] = {"dtype": info.dtype, "shape": shape, "data_offsets": [position, position + run.size]}
        position += run.size
        runs.append(run)
    return RankCut(packed_header(entries), Pieces(tuple(run for run in runs if run.size)), config)


def config_text(document: Mapping[str, Any]) -> bytes:
    """An adapter_config.json, always the same for the same content."""
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def write_cut(layout: AdapterLayout, rank: int, directory: Path) -> None:
    """Write the PEFT folder of `rank` out of an adapter on disk.

    Raises:
        RequestInvalid: the adapter was not trained for that rank.
        FileBroken: its mark does not fit.
    """
    nested = check_rank(nested_ranks(layout), rank, "/rank")
    cut = rank_cut(layout.header, layout.document, layout.modules, nested, rank, with_config=False)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_bytes(config_text(cut.config))
    start, stop = cut.pieces.hull(0, cut.pieces.size)
    with layout.weights_path.open("rb") as source, (directory / WEIGHTS_NAME).open("wb") as target:
        source.seek(start)
        target.write(cut.head)
        chunks = (source.read(min(_CHUNK_BYTES, stop - at)) for at in range(start, stop, _CHUNK_BYTES))
        target.writelines(cut.pieces.sift(chunks, 0, cut.pieces.size))
