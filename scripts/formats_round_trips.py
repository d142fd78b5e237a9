"""What is lost when an adapter is handed out in a format and taken in again, from the bytes of real downloads.

Layouts of the corpus become files of some of their modules, with sides of a 64th and random numbers. Each goes the way
of an upload, is stored, is downloaded in every format that can hold it, and the download goes that way again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import RankwiseError, RequestInvalid
from artifacts.float_codes import encode
from artifacts.float_dtypes import is_float
from artifacts.formats.architectures import architecture, specified
from artifacts.formats.gguf import BASE_CONFIG
from artifacts.formats.roles import WEAK, part_of
from artifacts.formats.writing import Subject, subject_of
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, AdapterLayout
from artifacts.manifest import PEFT_FORMATS
from artifacts.safetensors_header import DTYPE_BYTES, TensorInfo, packed_header
from scripts.formats_engines import distance
from scripts.formats_report import CorpusValues, document_of, header_of, layouts, read
from storage import adapters
from storage.adapter_downloads import AdapterDownloads
from storage.base_configs import BaseConfigs
from storage.blobs import BlobStore
from storage.checksums import Crc32Cache
from storage.database import Database
from storage.downloads import Download, DownloadDtype, DownloadFormat
from storage.measures import Measures
from storage.segments import read_segments
from storage.tables import AdapterRow
from storage.written_downloads import Wish

FORMATS: tuple[DownloadFormat, ...] = get_args(DownloadFormat)
DTYPES: tuple[DownloadDtype, ...] = ("float32", "bfloat16")
NARROWER = 64
SCALED = 0.7
"""What every alpha is multiplied by: corpora have powers of two, which lose nothing."""
MODULES = 24
"""Of a file; of a larger one that many, evenly spread."""
_CLASSES = {"qwen": "Qwen2ForCausalLM", "mixtral": None, "gpt2": None, "": "LlamaForCausalLM"}
"""Part of a layout's name → the base model that is named for its GGUF file; the first that fits."""


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Of one layout in one format: the largest ‖ΔW − ΔW'‖/‖ΔW‖ of a module, and its number of modules."""

    name: str
    layout: DownloadFormat
    dtype: DownloadDtype
    modules: int
    difference: float


class Shelf:
    """A store for as many adapters as are tried."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = Database(f"sqlite:///{folder / 'x.db'}")
        self._database.upgrade()
        self._blobs = BlobStore(f"file://{folder / 'blobs'}")
        checksums = Crc32Cache(self._blobs, folder / "crc32")
        configs = BaseConfigs(self._database, self._blobs)
        self._downloads = AdapterDownloads(self._blobs, checksums, Measures(), configs)
        self._count = 0

    def close(self) -> None:
        self._database.dispose()

    def take_in(self, files: Mapping[str, bytes], base_config: Mapping[str, Any] | None = None) -> Path:
        """The folder of an upload."""
        self._count += 1
        staging = self._folder / f"staging-{self._count}"
        staging.mkdir()
        sent = []
        for number, (name, content) in enumerate(files.items()):
            path = staging / str(number)
            path.write_bytes(content)
            sent.append((name, path))
        return receive(sent, self._folder / f"work-{self._count}", IntakeLimits(), base_config=base_config)

    def store(self, directory: Path, name: str) -> AdapterRow:
        """Keep what was taken in."""
        manifest = inspect(directory)
        for file in manifest.files:
            self._blobs.put_file(directory / file.path, file.sha256)
        with self._database.write() as session:
            row, _ = adapters.add_adapter(session, manifest, name=name)
            session.refresh(row, ["files"])
            return row

    def hand_out(self, row: AdapterRow, layout: DownloadFormat, dtype: DownloadDtype) -> tuple[str, bytes]:
        """Name and bytes of a download. Raises RequestInvalid: the format can not hold the adapter."""
        found: Download = self._downloads.of(row, Wish(layout, dtype))
        return found.file_name, b"".join(read_segments(self._blobs, found.segments, 0, found.size))


def round_trips(name: str, layout: Mapping[str, Any], shelf: Shelf) -> Iterator[RoundTrip]:
    """Every format and dtype that can hold the layout.

    Raises:
        RankwiseError: a download is not read again.
    """
    understood = read(layout)
    if understood.refusals or any(module.block_key is not None for module in understood.modules):
        return  # no writer takes it
    config = _base_config(name)
    before = shelf.take_in(_files(layout, understood, config))
    row = shelf.store(before, name)
    manifest, deltas = adapters.manifest_of(row), Adapter.open(before)
    for form in FORMATS:
        for dtype in DTYPES:
            try:
                file_name, content = shelf.hand_out(row, form, dtype)
            except RequestInvalid:
                continue
            after = Adapter.open(shelf.take_in({file_name: content}, config))
            as_stored = form in ("peft", "safetensors") and row.format in PEFT_FORMATS
            names = _names(None if as_stored else subject_of(manifest, form, None), form, deltas)
            worst = max(_difference(deltas[old], after[new]) for old, new in names.items())
            # the other parts of a fused layer come back as modules that change nothing
            added = [after[path] for path in after.keys() - set(names.values())]
            if any(bool((item.B.double() @ item.A.double()).any()) for item in added):
                worst = math.inf
            yield RoundTrip(name, form, dtype, len(names), worst)


def _names(subject: Subject | None, form: DownloadFormat, before: Adapter) -> dict[str, str]:
    """Path → path of the same module in what was written."""
    if subject is None:
        return {path: path for path in before}
    bare = form in ("peft", "gguf")
    return {item.module.path: item.path if bare else f"{item.component}.{item.path}" for item in subject.placed}


def _difference(one: Any, other: Any) -> float:
    first, second = (item.scaling * item.B.double() @ item.A.double() for item in (one, other))
    return distance(second, first)


def _files(layout: Mapping[str, Any], understood: AdapterLayout, config: Mapping[str, Any] | None) -> dict[str, bytes]:
    """The layout as small files."""
    header, values, kept = header_of(layout), CorpusValues(layout), _kept_sides(understood)
    random = torch.Generator().manual_seed(0)
    # The names of a narrow copy do not always tell the model, whose sides are others.
    told = {} if understood.facts.architecture is None else specified(architecture(understood.facts.architecture))
    document: dict[str, Any] = {"__metadata__": told | header.metadata}
    content, position = [], 0
    for key, info in _spread(header.tensors).items():
        shape = [side if at in kept.get(key, ()) else _narrow(side) for at, side in enumerate(info.shape)]
        numbers = _scalar(values, info) if info.elements == 1 else torch.randn(shape, generator=random)
        dtype = "F32" if is_float(info.dtype) else info.dtype  # numbers that bfloat16 can not hold
        raw = _encoded(numbers, dtype)
        document[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(raw)]}
        content.append(raw)
        position += len(raw)
    files = {WEIGHTS_NAME: packed_header(document) + b"".join(content)}
    config_of_peft = document_of(layout)
    if config_of_peft is not None:
        if "lora_alpha" in config_of_peft:
            config_of_peft = config_of_peft | {"lora_alpha": SCALED * config_of_peft["lora_alpha"]}
        files[CONFIG_NAME] = json.dumps(config_of_peft).encode()
    if config is not None and CONFIG_NAME in files:
        files[BASE_CONFIG] = json.dumps(config).encode()
    return files


def _spread(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of `MODULES` modules."""
    stems: dict[str, None] = {}
    parts = {key: part_of(key) for key in tensors}
    for part in parts.values():
        if part is not None and part.role not in WEAK:
            stems[part.stem] = None
    chosen = set(list(stems)[:: math.ceil(len(stems) / MODULES)])
    return {key: tensors[key] for key, part in parts.items() if part is not None and part.stem in chosen}


def _scalar(values: CorpusValues, info: TensorInfo) -> Tensor:
    value = SCALED * values.scalar(info) if info.name.endswith("alpha") else 1.0
    return torch.full(info.shape, value)


def _encoded(numbers: Tensor, dtype: str) -> bytes:
    if is_float(dtype):
        return encode(numbers.numpy(), dtype)
    return np.ones(numbers.numel() * DTYPE_BYTES[dtype], np.uint8).tobytes()


def _narrow(side: int) -> int:
    return side // NARROWER if side >= 2 * NARROWER and side % NARROWER == 0 else side


def _kept_sides(understood: AdapterLayout) -> dict[str, tuple[int, ...]]:
    """Key → axes that are ranks."""
    kept = {}
    for module in understood.modules:
        kept[module.a_key] = (1,) if module.transposed else (0,)
        kept[module.b_key] = (0,) if module.transposed else (1,)
        if module.mid_key is not None:
            kept[module.mid_key] = (0, 1)
    return kept


def _base_config(name: str) -> dict[str, Any] | None:
    model = next(model for part, model in _CLASSES.items() if part in name)
    if model is None:
        return None
    return {"architectures": [model], "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}


def all_round_trips() -> list[RoundTrip]:
    """Every layout of the corpus that is a LoRA of one file."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder))
        try:
            for name, layout in layouts().items():
                try:
                    understood = read(layout)
                except RankwiseError:
                    continue
                if not understood.refusals:
                    found += round_trips(name, layout, shelf)
        finally:
            shelf.close()
    return found
