from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from artifacts.errors import FileBroken
from artifacts.safetensors_header import (
    BASE_DTYPE_BYTES,
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    looks_like_safetensors,
    parse_header,
    read_header,
)

STEADY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def parse(content: bytes) -> SafetensorsHeader:
    return parse_header(io.BytesIO(content), len(content), name="x.safetensors")


def build(header: Any, body: bytes = bytes(24)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def refused(content: bytes) -> str:
    with pytest.raises(FileBroken) as caught:
        parse(content)
    return caught.value.detail


def test_reads_a_good_file() -> None:
    content = build({"__metadata__": {"format": "pt"}, "w": ENTRY})
    header = parse(content)
    info = header.tensors["w"]
    assert (info.dtype, info.shape, info.elements) == ("F32", (2, 3), 6)
    assert (info.begin, info.end, header.file_size) == (header.data_start, len(content), len(content))
    assert header.metadata == {"format": "pt"}


def test_read_header_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\1")
    with pytest.raises(FileBroken, match=r"broken\.safetensors: truncated"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_file_shorter_than_its_length_prefix(size: int) -> None:
    assert "truncated" in refused(bytes(size))


def test_truncated_inside_the_header() -> None:
    assert "truncated inside the header" in refused(build({"w": ENTRY})[:20])


def test_truncated_inside_the_data() -> None:
    assert "truncated" in refused(build({"w": ENTRY})[:-1])


def test_bytes_after_the_last_tensor() -> None:
    assert "1 bytes follow" in refused(build({"w": ENTRY}) + b"\0")


def test_header_length_of_two_to_the_63() -> None:
    assert "the header claims 9223372036854775808 bytes" in refused((2**63).to_bytes(8, "little") + b"{}")


def test_header_just_over_the_limit() -> None:
    assert "at most" in refused((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))


@pytest.mark.parametrize("end", [24, 28])
def test_overlapping_offsets(end: int) -> None:
    second = {"dtype": "U8", "shape": [end - 20], "data_offsets": [20, end]}
    assert "overlaps" in refused(build({"w": ENTRY, "v": second}, bytes(28)))


def test_gap_between_tensors() -> None:
    second = {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}
    assert "leaves a gap" in refused(build({"w": ENTRY, "v": second}, bytes(32)))


def test_offsets_out_of_range() -> None:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [2**40, 2**40 + 24]}
    assert "gap" in refused(build({"w": entry}))


@pytest.mark.parametrize(
    "offsets", [[24, 0], [0], [0, 24, 24], [0.0, 24], [-24, 0], ["0", "24"], None, [True, 24], [0, 2**64]]
)
def test_offsets_that_are_none(offsets: Any) -> None:
    refused(build({"w": {**ENTRY, "data_offsets": offsets}}))


@pytest.mark.parametrize("shape", [[2, -3], "6", [2, 3.0], [[2, 3]], [1] * 9, [2**62, 2**62, 2**62], [True, 6], None])
def test_shapes_that_are_none(shape: Any) -> None:
    refused(build({"w": {**ENTRY, "shape": shape}}))


def test_shape_that_does_not_fit_its_bytes() -> None:
    assert "needs 28 bytes" in refused(build({"w": {**ENTRY, "shape": [7]}}))


def test_duplicate_tensor() -> None:
    raw = b'{"w":%s,"w":%s}' % ((json.dumps(ENTRY).encode(),) * 2)
    assert "names 'w' twice" in refused(build(raw))


def test_duplicate_field_of_a_tensor() -> None:
    assert "'dtype' twice" in refused(build(b'{"w":{"dtype":"F32","dtype":"U8","shape":[6],"data_offsets":[0,24]}}'))


@pytest.mark.parametrize("dtype", ["F31", "f32", 3, None, ["F32"], "Q4_K", "F8_E8M0"])
def test_unknown_dtype(dtype: Any) -> None:
    assert "dtype" in refused(build({"w": {**ENTRY, "dtype": dtype}}))


def test_dtypes_of_base_models_are_accepted_where_asked_for() -> None:
    content = build({"w": {"dtype": "F8_E8M0", "shape": [24], "data_offsets": [0, 24]}})
    header = parse_header(io.BytesIO(content), len(content), name="base", dtypes=BASE_DTYPE_BYTES)
    assert header.tensors["w"].elements == 24


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"w":1}', b"[" * 100_000, b'{"w":{"dtype":NaN}}']
)
def test_headers_that_are_no_object_of_tensors(raw: bytes) -> None:
    refused(build(raw))


@pytest.mark.parametrize("metadata", [{"a": 1}, [], "text", {"a": {"b": "c"}}, None])
def test_metadata_that_is_no_map_of_strings(metadata: Any) -> None:
    assert "__metadata__" in refused(build({"__metadata__": metadata, "w": ENTRY}))


def test_integers_of_thousands_of_digits() -> None:
    refused(build(b'{"w":{"dtype":"U8","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,24]}}'))


def test_empty_tensors_and_scalars() -> None:
    header = parse(
        build(
            {
                "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
                "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
                "last": {"dtype": "F32", "shape": [4, 0], "data_offsets": [4, 4]},
            },
            bytes(4),
        )
    )
    assert [info.elements for info in header.tensors.values()] == [0, 1, 0]


@STEADY
@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_file_broken(content: bytes) -> None:
    try:
        parse(content)
    except FileBroken:
        return
    assert looks_like_safetensors(content) or content[8:9].isspace()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
FIELDS = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, max_size=3)


@STEADY
@given(
    header=st.dictionaries(st.sampled_from(["w", "v", "__metadata__"]), JSON | FIELDS | st.just(ENTRY), max_size=3),
    changes=FIELDS,
    cut=st.integers(0, 200),
)
def test_mutated_headers_raise_nothing_but_file_broken(
    header: dict[str, Any], changes: dict[str, Any], cut: int
) -> None:
    if isinstance(header.get("w"), dict):
        header["w"] = {**header["w"], **changes}
    content = build(header)
    for candidate in (content, content[: len(content) - cut]):
        try:
            parse(candidate)
        except FileBroken:
            continue


@STEADY
@given(st.integers(0, 200), st.integers(0, 255))
def test_flipped_bytes_raise_nothing_but_file_broken(position: int, value: int) -> None:
    content = bytearray(build({"__metadata__": {"format": "pt"}, "w": ENTRY}))
    content[position % len(content)] = value
    try:
        header = parse(bytes(content))
    except FileBroken:
        return
    assert sum(info.end - info.begin for info in header.tensors.values()) == 24


ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(
            [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
        ),
        st.lists(st.integers(0, 4), max_size=4),
    ),
    min_size=1,
    max_size=6,
)


@STEADY
@given(ARRAYS, st.none() | st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3))
def test_whatever_the_reference_library_writes_is_read(arrays: dict[str, Any], metadata: dict[str, str] | None) -> None:
    content = save({name: np.zeros(shape, dtype) for name, (dtype, shape) in arrays.items()}, metadata)
    header = parse(content)
    assert header.tensors.keys() == arrays.keys()
    assert all(info.shape == tuple(arrays[name][1]) for name, info in header.tensors.items())
    assert dict(header.metadata) == (metadata or {})
    assert looks_like_safetensors(content)


def test_headers_that_begin_like_other_formats_are_told_apart() -> None:
    # lengths 0x0480 and 0x088b1f: the first bytes of a pickle of protocol 4 and of a gzip stream
    assert looks_like_safetensors((0x0480).to_bytes(8, "little") + b"{")
    assert looks_like_safetensors((0x088B1F).to_bytes(8, "little") + b"{")
    assert not looks_like_safetensors(b"\x80\x04\x95\x10\0\0\0\0\0{")
    assert set(DTYPE_BYTES) <= set(BASE_DTYPE_BYTES)
