"""An adapter in another format, dtype or rank than it is stored in: laid out ahead, computed as it is sent.

Only the header is made at once. The factors of a module are read, converted and sent before the next one's, so that a
download holds one module in memory, and any range of it can be asked for. What computes is imported when it is needed.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from artifacts.errors import FieldError, RequestInvalid
from artifacts.float_dtypes import WRITABLE, is_float
from artifacts.formats.pairs import Pair
from artifacts.formats.writers import WRITERS
from artifacts.formats.writing import Plan, check_cost, refuse, subject_of
from artifacts.gguf_file import gguf_head, padding
from artifacts.layout import CONFIG_NAME, LINEAGE_KEY, METADATA_KEY, WEIGHTS_NAME
from artifacts.manifest import PEFT_FORMATS
from artifacts.public_names import public_name
from artifacts.rank_cut import config_text
from artifacts.safetensors_header import DTYPE_BYTES, TensorInfo, packed_header
from storage.adapters import manifest_of
from storage.blobs import BlobStore
from storage.checksums import Crc32Cache
from storage.downloads import (
    SAFETENSORS_TYPE,
    Download,
    DownloadDtype,
    DownloadFormat,
    check_blobs,
    config_of,
    directory_files,
    etag_of,
    file_stem,
    stored_header,
    weights_of,
    zipped,
)
from storage.measures import Measures
from storage.segments import BlobSlice, MadeBytes, Segment, read_segments, total_size
from storage.tables import AdapterRow
from storage.zip_layout import ZipEntry, blob_entry, bytes_entry

EXPORT_KEY = "rankwise_export"
"""The key of a file's metadata under which it says what it was written from, and how exactly."""
ERROR_HEADER = "Rankwise-Relative-Error"
_CARRIED = (LINEAGE_KEY, "ss_base_model_version", "modelspec.architecture")


@dataclass(frozen=True, slots=True)
class Wish:
    """How an adapter is asked for; None leaves a thing as it is. `base_config` is config.json of its base model."""

    layout: DownloadFormat
    dtype: DownloadDtype | None = None
    rank: int | None = None
    base_config: Mapping[str, Any] | None = None


class _Source:
    """The stored file: its header, and the bytes of its tensors."""

    def __init__(self, blobs: BlobStore, row: AdapterRow) -> None:
        self.row = row
        stored = manifest_of(row)
        self.manifest = replace(stored, base_model=public_name(stored.base_model), config=config_of(row))
        self.sha256 = weights_of(row).sha256
        self.header, _ = stored_header(blobs, weights_of(row))

    def reader(self, blobs: BlobStore) -> Callable[[str], tuple[TensorInfo, bytes]]:
        """Key → entry in the header and bytes."""

        def read(key: str) -> tuple[TensorInfo, bytes]:
            info = self.header.tensors[key]
            return info, b"".join(blobs.stream(self.sha256, info.begin, info.end))

        return read


@dataclass(frozen=True, slots=True)
class _Written:
    """What is to be sent: entries of the header in the order of their bytes, and what makes these.

    `error` is the relative error of `error_of`, None where there is no such number.
    """

    entries: tuple[tuple[str, str, tuple[int, ...]], ...]
    segments: tuple[Segment, ...]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    error: float | None
    error_of: str = "delta"
    recomputed: bool = False
    values: Mapping[str, str | float] = field(default_factory=dict)

    def gguf_head(self, metadata: Mapping[str, str]) -> bytes:
        """The beginning of a GGUF file."""
        said = {f"rankwise.{name.removeprefix('rankwise_')}": text for name, text in metadata.items()}
        return gguf_head({**self.values, **said}, self.entries)

    def head(self, metadata: Mapping[str, str]) -> bytes:
        """The beginning of a safetensors file."""
        document: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for name, dtype, shape in self.entries:
            end = position + math.prod(shape) * DTYPE_BYTES[dtype]
            document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        return packed_header(document)


def written_download(blobs: BlobStore, crc32: Crc32Cache, measures: Measures, row: AdapterRow, wish: Wish) -> Download:
    """The adapter as `wish` says.

    Raises:
        RequestInvalid: the format, dtype or rank can not hold it.
        BlobMissing, FileBroken: as `safetensors_download`.
    """
    check_blobs(blobs, row.files)
    source = _Source(blobs, row)
    in_peft = wish.layout in ("peft", "safetensors") and row.format in PEFT_FORMATS
    if in_peft and wish.rank is None and wish.dtype is not None:
        written = _recast(blobs, measures, source, wish)
    else:
        written = _rewritten(blobs, measures, source, wish)
    statement = {
        "adapter": row.id,
        "weights_sha256": source.sha256,
        "format": wish.layout,
        "dtype": wish.dtype,
        "rank": wish.rank,
        "relative_error": None if written.error is None else float(f"{written.error:.3g}"),
        "error_of": written.error_of,
    }
    stored = source.header.metadata
    metadata = {name: stored[name] for name in _CARRIED if name in stored}
    metadata |= dict(written.metadata) | {EXPORT_KEY: json.dumps(statement, sort_keys=True)}
    if written.config:
        metadata[METADATA_KEY] = json.dumps(written.config, sort_keys=True)
    head = written.gguf_head(metadata) if written.values else written.head({"format": "pt"} | metadata)
    content = (head, *written.segments)
    return _as_file(blobs, crc32, measures, row, wish, written, content)


def _as_file(
    blobs: BlobStore,
    crc32: Crc32Cache,
    measures: Measures,
    row: AdapterRow,
    wish: Wish,
    written: _Written,
    content: tuple[Segment, ...],
) -> Download:
    etag = etag_of("written", content)
    words = [file_stem(row), *([] if wish.layout in ("peft", "safetensors", "gguf") else [wish.layout])]
    words += [] if wish.rank is None else [f"rank-{wish.rank}"]
    words += [] if wish.dtype is None else [wish.dtype]
    name = "-".join(words)
    headers = {} if written.error is None else {ERROR_HEADER: f"{written.error:.3g}"}
    # What another machine computes may differ in its last bits: then the tag does not promise equal bytes.
    weak = "W/" if written.recomputed else ""
    if wish.layout != "peft":
        suffix = "gguf" if written.values else "safetensors"
        return Download(content, f"{weak}{etag}", SAFETENSORS_TYPE, f"{name}.{suffix}", headers)
    size = total_size(content)
    if written.recomputed:
        checksum = measures.get(("crc32", etag), lambda: _crc32(read_segments(blobs, content, 0, size)))
    else:
        checksum = crc32.made(etag.strip('"'), lambda: read_segments(blobs, content, 0, size))
    weights = weights_of(row)
    others = [file for file in directory_files(row) if file.path not in (CONFIG_NAME, weights.path)]
    entries = [blob_entry(file.path, file.sha256, file.size, crc32.get(file.sha256)) for file in others]
    entries.append(bytes_entry(CONFIG_NAME, config_text(written.config)))
    entries.append(ZipEntry(WEIGHTS_NAME, checksum, size, content))
    packed = zipped(entries, name)
    return Download(
        packed.segments, f"{weak}{packed.etag}", packed.media_type, packed.file_name, headers, packed.members
    )


def _rewritten(blobs: BlobStore, measures: Measures, source: _Source, wish: Wish) -> _Written:
    """The factors under the names of a format."""
    name = "peft" if wish.layout == "safetensors" else wish.layout
    if wish.layout == "safetensors" and source.row.format not in PEFT_FORMATS:
        refuse(
            wish.layout,
            f"it hands out what is stored, in the format {source.row.format}",
            f"For another dtype or rank name a format: {', '.join(WRITERS)}.",
        )
    plan = WRITERS[name].plan(subject_of(source.manifest, name, wish.rank, wish.base_config))
    check_cost(plan.pairs)
    dtype = WRITABLE[wish.dtype] if wish.dtype is not None else _own_dtype(plan)
    error = _error(blobs, measures, source, plan, dtype)
    alphas = [pair for pair in plan.pairs if pair.alpha_name]
    entries: list[tuple[str, str, tuple[int, ...]]] = [(pair.alpha_name, "F32", ()) for pair in alphas]
    segments: list[Segment] = [struct.pack(f"<{len(alphas)}f", *(pair.alpha for pair in alphas))]
    for pair in plan.pairs:
        shapes = pair.shapes()
        entries += [(name, dtype, shape) for name, shape in zip((pair.a_name, pair.b_name), shapes, strict=True)]
        sizes = [math.prod(shape) * DTYPE_BYTES[dtype] for shape in shapes]
        gaps = [padding(size) if plan.values else b"" for size in sizes]
        segments.append(MadeBytes(sum(sizes) + sum(map(len, gaps)), _maker(source, pair, dtype, gaps)))
    recomputed = any(pair.truncated for pair in plan.pairs)
    return _Written(
        tuple(entries), tuple(segments), plan.config, plan.metadata, error, recomputed=recomputed, values=plan.values
    )


def _maker(source: _Source, pair: Pair, dtype: str, gaps: Sequence[bytes]) -> Callable[[BlobStore], bytes]:
    def make(blobs: BlobStore) -> bytes:
        from artifacts.pair_numbers import encoded

        a, b = encoded(pair, source.reader(blobs), dtype)
        return b"".join((a, gaps[0], b, gaps[1]))

    return make


def _error(blobs: BlobStore, measures: Measures, source: _Source, plan: Plan, dtype: str) -> float | None:
    """The relative error of ΔW.

    Raises:
        RequestInvalid: the dtype can not hold a number.
    """
    if all(pair.exact(dtype) for pair in plan.pairs):
        return 0.0
    from artifacts.pair_numbers import relative_error

    key = (source.sha256, dtype, tuple((pair.a_name, pair.rank, pair.told) for pair in plan.pairs))
    error, lost = measures.get(key, lambda: relative_error(plan.pairs, source.reader(blobs), dtype))
    if lost:
        _overflow(lost, dtype)
    return error


def _own_dtype(plan: Plan) -> str:
    """That of the factors, if they have one that is written; else float32."""
    found = {module.dtype for pair in plan.pairs for module in pair.modules}
    return found.pop() if len(found) == 1 and found <= set(WRITABLE.values()) else "F32"


def _recast(blobs: BlobStore, measures: Measures, source: _Source, wish: Wish) -> _Written:
    """The stored tensors, whatever they mean, in another dtype."""
    assert wish.dtype is not None
    dtype, row = WRITABLE[wish.dtype], source.row
    if wish.layout == "peft" and not ("r" in row.config or "peft_type" in row.config):
        refuse("peft", "it holds the adapters of several components", "Download it with format=safetensors.")
    tensors = list(source.header.tensors.values())
    entries = tuple((info.name, dtype if is_float(info.dtype) else info.dtype, info.shape) for info in tensors)
    segments = tuple(_recast_segment(source, info, dtype) for info in tensors)
    try:
        plan = WRITERS["peft"].plan(subject_of(source.manifest, "peft", None))
    except RequestInvalid:
        from artifacts.pair_numbers import rounding_error

        key = (source.sha256, dtype, "tensors")
        error, lost = measures.get(key, lambda: rounding_error(tensors, source.reader(blobs), dtype))
        if lost:
            _overflow(lost, dtype)
        return _Written(entries, segments, config_of(row), _marks(source), error, "tensors")
    error = _error(blobs, measures, source, plan, dtype)
    return _Written(entries, segments, config_of(row), _marks(source), error)


def _marks(source: _Source) -> Mapping[str, str]:
    """What the metadata of the stored file says of its own tensors."""
    return {key: value for key, value in source.header.metadata.items() if key != METADATA_KEY}


def _recast_segment(source: _Source, info: TensorInfo, dtype: str) -> Segment:
    if not is_float(info.dtype) or info.dtype == dtype:
        return BlobSlice(source.sha256, info.begin, info.end)

    def make(blobs: BlobStore) -> bytes:
        from artifacts.float_codes import decode, encode

        _, raw = source.reader(blobs)(info.name)
        return encode(decode(raw, info.dtype), dtype)

    return MadeBytes(info.elements * DTYPE_BYTES[dtype], make)


def _overflow(where: str, dtype: str) -> NoReturn:
    raise RequestInvalid(
        f"{dtype} can not hold the numbers of {where}: some are too large.",
        hint="bfloat16 and float32 hold larger numbers.",
        errors=[FieldError("/query/dtype", f"too small for {where}")],
    )


def _crc32(chunks: Iterable[bytes]) -> int:
    value = 0
    for chunk in chunks:
        value = zlib.crc32(chunk, value)
    return value
