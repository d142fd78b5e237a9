"""The content of a weights file in one pass: its digests, and its NaN, Inf and all-zero tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from artifacts.errors import FileBroken
from artifacts.manifest import LoraModule, NestedRanks
from artifacts.peft_config import PeftLoraConfig
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo

BUFFER_BYTES = 2 * 1024 * 1024
BUFFERS = 3
"""Memory of a scan: three buffers in flight and one of scratch, whatever the file's size."""

# dtype → (unsigned integer of its width, mask that drops the sign, smallest magnitude that is Inf or NaN)
_FLOAT_BITS: Mapping[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F8_E5M2": ("<u1", 0x7F, 0x7C),
    "F8_E4M3": ("<u1", 0x7F, 0x7F),  # no Inf, and one NaN per sign
}


@dataclass(frozen=True, slots=True)
class ContentScan:
    """What a pass over a file found.

    Attributes:
        sha256: of the whole file.
        weights_digest: of the tensors without metadata and without their order; see `weights_digest`.
        nonfinite: tensor name → how many of its elements are NaN or Inf; only tensors that have some.
        zero: names of tensors all of whose elements are zero.
    """

    sha256: str
    weights_digest: str
    nonfinite: Mapping[str, int]
    zero: frozenset[str]


def scan(path: Path, header: SafetensorsHeader, *, sha256: str | None = None) -> ContentScan:
    """Read the file once; memory grows by a few buffers whatever its size.

    Args:
        sha256: the file's SHA-256 if it is known, as after an upload that was hashed on its way; it is then not
            computed again, which saves a third of the time.

    Raises:
        FileBroken: the file is shorter than its header said: it changed since.
    """
    return _Scan(header, sha256).run(path)


def weights_digest(path: Path, header: SafetensorsHeader) -> str:
    """SHA-256 over the sorted lines (name, dtype, shape, SHA-256 of the bytes) of all tensors.

    Metadata and the order of tensors in the file do not count, so a re-saved copy has the same digest.
    """
    return scan(path, header).weights_digest


def count_nonfinite(path: Path, header: SafetensorsHeader) -> dict[str, int]:
    """Tensor name → number of NaN and Inf elements, for the tensors that have any."""
    return dict(scan(path, header).nonfinite)


def tensor_digests(path: Path, header: SafetensorsHeader) -> Iterator[tuple[TensorInfo, str]]:
    """Each tensor with the SHA-256 of its bytes, in the order of the file.

    Raises:
        FileBroken: the file became shorter while it was read.
    """
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(header.data_start)
        for info in header.tensors.values():
            digest, size = hashlib.sha256(), info.end - info.begin
            while size > 0:
                piece = buffer[: min(size, BUFFER_BYTES)]
                _fill(file, piece)
                digest.update(piece)
                size -= len(piece)
            yield info, digest.hexdigest()


def combine_digests(entries: Iterable[tuple[TensorInfo, str]]) -> str:
    """The weights digest from the digests of single tensors, possibly of several files."""
    lines = [
        json.dumps([info.name, info.dtype, list(info.shape), digest], separators=(",", ":")) for info, digest in entries
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def identity_digest(
    weights: str,
    configs: Mapping[str, PeftLoraConfig],
    modules: Collection[LoraModule],
    nested: NestedRanks | None = None,
) -> str:
    """SHA-256 over the weights digest and whatever else of the configuration changes ΔW.

    Patterns count by their effect, the scaling of each module; names of base models, dropout and the like do not count.
    The ranks that an adapter can be cut to do: a copy that lost them is another adapter.
    """
    document: dict[str, Any] = {
        "weights": weights,
        "scaling": sorted((module.path, module.scaling) for module in modules),
        "configs": {component: config.delta_fields for component, config in configs.items()},
    }
    reordered = sorted((module.path, module.head_rows) for module in modules if module.head_rows)
    if reordered:
        document["head_rows"] = reordered
    if nested is not None:
        document["nested"] = asdict(nested)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in buffers."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True)
class _Found:
    """What is known of one tensor while it is read."""

    nonfinite: int = 0
    zero: bool = True
    digest: Any = field(default_factory=hashlib.sha256)


class _Scan:
    """Reads into a ring of buffers. A second thread hashes while this one looks at the numbers; hashlib and numpy
    release the interpreter lock on large buffers."""

    def __init__(self, header: SafetensorsHeader, sha256: str | None) -> None:
        import numpy as np

        self._numpy = np
        self._header = header
        self._known_sha256 = sha256
        self._file_hash = hashlib.sha256()
        self._buffers = [bytearray(BUFFER_BYTES) for _ in range(BUFFERS)]
        self._scratch = np.empty(BUFFER_BYTES, dtype=np.uint8)
        self._pending: list[Future[None] | None] = [None] * BUFFERS
        self._turn = 0

    def run(self, path: Path) -> ContentScan:
        found = {name: _Found() for name in self._header.tensors}
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, "sha256") as pool:
            self._skip_header(file)
            for name, info in self._header.tensors.items():
                for piece in self._read(file, info.end - info.begin, pool, found[name]):
                    self._inspect(info.dtype, piece, found[name])
        # all digests are complete now: leaving the pool waits for its last task
        infos = self._header.tensors
        return ContentScan(
            self._known_sha256 or self._file_hash.hexdigest(),
            combine_digests((infos[name], item.digest.hexdigest()) for name, item in found.items()),
            {name: item.nonfinite for name, item in found.items() if item.nonfinite},
            frozenset(name for name, item in found.items() if item.zero and infos[name].elements),
        )

    def _skip_header(self, file: FileIO) -> None:
        header = bytearray(self._header.data_start)
        _fill(file, memoryview(header))
        self._file_hash.update(header)

    def _read(self, file: FileIO, size: int, pool: ThreadPoolExecutor, found: _Found) -> Iterator[memoryview]:
        while size > 0:
            turn = self._turn
            self._turn = (turn + 1) % BUFFERS
            pending = self._pending[turn]
            if pending is not None:
                pending.result()
            piece = memoryview(self._buffers[turn])[: min(size, BUFFER_BYTES)]
            _fill(file, piece)
            if self._known_sha256 is None:
                self._pending[turn] = pool.submit(self._file_hash.update, piece)
                found.digest.update(piece)
            else:
                self._pending[turn] = pool.submit(found.digest.update, piece)
            size -= len(piece)
            yield piece

    def _inspect(self, dtype: str, piece: memoryview, found: _Found) -> None:
        np = self._numpy
        bits = _FLOAT_BITS.get(dtype)
        if bits is None:
            found.zero = found.zero and not np.frombuffer(piece, dtype=np.uint8).any()
            return
        kind, mask, limit = bits
        values = np.frombuffer(piece, dtype=kind)
        scratch = self._scratch.view(kind)[: values.size]
        np.bitwise_and(values, mask, out=scratch)
        largest = int(scratch.max())
        found.zero = found.zero and largest == 0
        if largest >= limit:
            found.nonfinite += int(np.count_nonzero(scratch >= limit))


def _fill(file: FileIO, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        count = file.readinto(piece[done:])
        if not count:
            raise FileBroken("The file became shorter while it was read.")
        done += count
