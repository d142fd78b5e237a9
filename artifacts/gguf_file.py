"""The container GGUF: its header, read without trusting a byte of it, and written. No torch.

A header is a list of typed values and a list of tensors; sides of a tensor stand with the fastest one first, the other
way round than in safetensors. (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from artifacts.errors import FileBroken, FormatUnknown
from artifacts.safetensors_header import MAX_HEADER_BYTES

MAGIC = b"GGUF"
ALIGNMENT = 32
"""Bytes to a multiple of which tensors are padded, unless the file says otherwise."""
ALIGNMENT_KEY = "general.alignment"
MAX_NAME_BYTES = 500
_MAX_DIMENSIONS = 4
_MAX_TEXT_BYTES = 1 << 16
_MOST_ELEMENTS = 1 << 48
_MOST_VALUES, _MOST_TENSORS, _MOST_TEXTS = 10_000, 100_000, 1_000_000
"""An adapter has some tens of values and two tensors for each module; lists of texts are those of a vocabulary."""

Value = str | int | float | bool

# number of a type in the file → its format; strings and arrays are read on their own
_SCALARS: Mapping[int, struct.Struct] = MappingProxyType(
    {
        0: struct.Struct("<B"),
        1: struct.Struct("<b"),
        2: struct.Struct("<H"),
        3: struct.Struct("<h"),
        4: struct.Struct("<I"),
        5: struct.Struct("<i"),
        6: struct.Struct("<f"),
        7: struct.Struct("<?"),
        10: struct.Struct("<Q"),
        11: struct.Struct("<q"),
        12: struct.Struct("<d"),
    }
)
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True, slots=True)
class Encoding:
    """How elements are stored: `bytes` for each `block` of them."""

    name: str
    block: int
    bytes: int


ENCODINGS: Mapping[int, Encoding] = MappingProxyType(
    {0: Encoding("F32", 1, 4), 1: Encoding("F16", 1, 2), 8: Encoding("Q8_0", 32, 34), 30: Encoding("BF16", 1, 2)}
)
"""The encodings that are read, by their number in the file."""
_NUMBERS = {encoding.name: number for number, encoding in ENCODINGS.items()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `shape` with the fastest side last; `begin` and `end` are absolute byte offsets in the file."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the tensors.

    Attributes:
        values: text and numbers by their keys.
        arrays: keys of the values that are lists, which are not kept.
        tensors: by name, in the order of the file.
    """

    values: Mapping[str, Value]
    arrays: frozenset[str]
    tensors: Mapping[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether the first bytes are a GGUF file's."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file.

    Raises:
        FormatUnknown: no GGUF, of a version or byte order that is not read, or it holds a model.
        FileBroken: a header of more than `MAX_HEADER_BYTES`; a count, length or type that can not be; a name twice; a
            tensor of an encoding that is not read, or whose bytes do not lie where they must.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    return parse_gguf_header(start, size)


def parse_gguf_header(start: bytes, file_size: int) -> GgufHeader:
    """As `read_gguf_header`, from the first bytes of a file."""
    if start[:4] != MAGIC:
        raise FormatUnknown("It is no GGUF file.")
    return _Parser(start, file_size).run()


class _Parser:
    """Every count is held against the bytes that are left before anything is made of it."""

    def __init__(self, data: bytes, file_size: int) -> None:
        self._data = data
        self._at = 4
        self._file_size = file_size

    def run(self) -> GgufHeader:
        version = self._number(4)
        if version not in (2, 3):
            other = "; its bytes stand in the big-endian order" if version in (2 << 24, 3 << 24) else ""
            raise FormatUnknown(f"It is GGUF of version {version}{other}; 2 and 3 are read, in little-endian order.")
        tensor_count, value_count = self._number(10), self._number(10)
        # a value has at least its key's length, its type and one byte; a tensor all its fields
        self._check_count(value_count, 13, _MOST_VALUES, "values")
        self._check_count(tensor_count, 33, _MOST_TENSORS, "tensors")
        values: dict[str, Value] = {}
        arrays: set[str] = set()
        for _ in range(value_count):
            self._value(values, arrays)
        alignment = values.get(ALIGNMENT_KEY, ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment not in _ALIGNMENTS:
            raise FileBroken(f"{ALIGNMENT_KEY} is {str(alignment)[:40]}, no power of two up to {_ALIGNMENTS[-1]}.")
        plain = [self._tensor() for _ in range(tensor_count)]
        return GgufHeader(values, frozenset(arrays), self._placed(plain, alignment))

    def _value(self, values: dict[str, Value], arrays: set[str]) -> None:
        key, kind = self._text(MAX_NAME_BYTES), self._number(4)
        if not key or not key.isprintable():
            raise FileBroken(f"The key {key[:80]!r} has characters that can not be printed, or none.")
        if key in values or key in arrays:
            raise FileBroken(f"The header has {key!r} twice.")
        if kind == _ARRAY:
            self._skip_array(key)
            arrays.add(key)
        elif kind == _STRING:
            values[key] = self._text(_MAX_TEXT_BYTES)
        else:
            values[key] = self._scalar(kind, key)
        if key == "general.type" and values.get(key) != "adapter":
            raise FormatUnknown(
                f"The GGUF file holds no adapter: its general.type is {str(values.get(key))[:40]!r}.",
                hint="Send an adapter as convert_lora_to_gguf.py of llama.cpp writes it. Models are not taken.",
            )

    def _scalar(self, kind: int, key: str) -> Value:
        if kind not in _SCALARS:
            raise FileBroken(f"{key!r} has the type {kind}, which is none.")
        return self._number(kind)

    def _skip_array(self, key: str) -> None:
        kind, count = self._number(4), self._number(10)
        if kind == _STRING:
            self._check_count(count, 8, _MOST_TEXTS, f"elements of {key!r}")
            for _ in range(count):
                self._take(self._number(10), "a text")
        elif kind in _SCALARS:
            self._take(count * _SCALARS[kind].size, f"{key!r}")
        else:
            raise FileBroken(f"{key!r} is a list of the type {kind}, which is not read.")

    def _tensor(self) -> tuple[str, Encoding, tuple[int, ...], int]:
        name, dimensions = self._text(MAX_NAME_BYTES), self._number(4)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise FileBroken(f"{name[:80]!r} has {dimensions} dimensions.")
        sides = [self._number(10) for _ in range(dimensions)]
        number, offset = self._number(4), self._number(10)
        if not name or not name.isprintable():
            raise FileBroken(f"The tensor name {name[:80]!r} has characters that can not be printed, or none.")
        if math.prod(sides) > _MOST_ELEMENTS or 0 in sides:
            raise FileBroken(f"{name!r} has the sides {sides}.")
        encoding = ENCODINGS.get(number)
        if encoding is None:
            called = _called(number)
            read = ", ".join(item.name for item in ENCODINGS.values())
            raise FileBroken(
                f"{name!r} is stored in the encoding {called}; {read} are read.",
                hint="Convert the adapter again with --outtype f32, f16 or bf16.",
            )
        if sides[0] % encoding.block:
            raise FileBroken(f"{name!r}: rows of {sides[0]} elements are no blocks of {encoding.name}.")
        return name, encoding, tuple(reversed(sides)), offset

    def _placed(
        self, plain: Sequence[tuple[str, Encoding, tuple[int, ...], int]], alignment: int
    ) -> Mapping[str, GgufTensor]:
        start, position = _padded(self._at, alignment), 0
        found: dict[str, GgufTensor] = {}
        for name, encoding, shape, offset in plain:
            if name in found:
                raise FileBroken(f"The header has {name!r} twice.")
            if offset != position:
                raise FileBroken(f"{name!r} begins at byte {offset} of the data; it must be {position}.")
            size = math.prod(shape) // encoding.block * encoding.bytes
            found[name] = GgufTensor(name, encoding, shape, start + offset, start + offset + size)
            position = _padded(offset + size, alignment)
        end = max((tensor.end for tensor in found.values()), default=start)
        if end > self._file_size:
            raise FileBroken(f"Truncated: the header describes {end} bytes, the file has {self._file_size}.")
        if self._file_size > start + position:
            raise FileBroken(f"{self._file_size - start - position} bytes follow the last tensor.")
        return found

    def _check_count(self, count: int, smallest: int, most: int, what: str) -> None:
        if count > most or count * smallest > len(self._data) - self._at:
            fault = "that many do not fit into it" if count <= most else f"at most {most} are accepted"
            raise FileBroken(f"The header claims {count} {what}; {fault}.")

    def _text(self, most: int) -> str:
        length = self._number(10)
        if length > most:
            raise FileBroken(f"A text of the header claims {length} bytes; at most {most} are accepted.")
        try:
            return self._take(length, "a text").decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileBroken(f"A text of the header is not UTF-8: {error}.") from error

    def _number(self, kind: int) -> int:
        packed = _SCALARS[kind]
        (value,) = packed.unpack(self._take(packed.size, "a number"))
        return value  # type: ignore[no-any-return]

    def _take(self, length: int, what: str) -> bytes:
        end = self._at + length
        if end > len(self._data):
            there = "larger than 10 MB" if len(self._data) >= MAX_HEADER_BYTES else "truncated"
            raise FileBroken(f"The header is {there}: it ends inside of {what}.")
        taken, self._at = self._data[self._at : end], end
        return taken


def _called(number: int) -> str:
    """The name of an encoding that is refused."""
    from gguf.constants import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(number).name)
    except ValueError:
        return f"of number {number}"


_ALIGNMENTS = tuple(1 << power for power in range(13))


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def padding(size: int) -> bytes:
    """What follows a tensor of that many bytes."""
    return bytes(_padded(size) - size)


def gguf_head(values: Mapping[str, str | float], tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file of version 3.

    Args:
        values: text, and numbers that are stored as float32.
        tensors: name, encoding and shape with the fastest side last, in the order in which their bytes follow, each
            with its `padding`.
    """
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        parts.append(_packed(key))
        if isinstance(value, str):
            parts += [struct.pack("<I", _STRING), _packed(value)]
        else:
            parts.append(struct.pack("<If", _FLOAT32, value))
    position = 0
    for name, encoding, shape in tensors:
        number = _NUMBERS[encoding]
        parts.append(_packed(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, position))
        position += _padded(math.prod(shape) * ENCODINGS[number].bytes)
    head = b"".join(parts)
    return head + padding(len(head))


def _packed(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
