"""llama.cpp's adapters. The trap: rows of queries and keys in another order, which only the base model's heads tell."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from artifacts import gguf_intake
from artifacts.adapter import Adapter
from artifacts.errors import ConfigRefused, FileBroken, FormatUnknown, RankwiseError, TooLarge
from artifacts.formats.gguf import FAMILIES
from artifacts.gguf_file import gguf_head, padding, parse_gguf_header, read_gguf_header
from artifacts.intake import IntakeLimits, inspect, receive

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}
BLOCK = "blk.0.attn_q.weight"
Numbers = NDArray[Any]


def pair(stem: str, d_out: int, d_in: int, rank: int = 3, seed: int = 0) -> dict[str, Numbers]:
    random = np.random.default_rng(seed)
    return {
        f"{stem}.lora_a": random.standard_normal((rank, d_in)).astype(np.float32),
        f"{stem}.lora_b": random.standard_normal((d_out, rank)).astype(np.float32),
    }


def write(
    path: Path, tensors: Mapping[str, Any], architecture: str = "llama", alpha: float | None = 6.0, **values: Any
) -> Path:
    """A file as llama.cpp's own library writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(values.pop("type", "adapter"))
    writer.add_string("adapter.type", values.pop("adapter_type", "lora"))
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in values.items():
        writer.add_array(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        data, raw = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def take_in(folder: Path, path: Path, config: Any = HEADS) -> Path:
    sent = [("adapter.gguf", path)]
    if config is not None:
        beside = folder / "sent.json"
        beside.write_text(json.dumps(config))
        sent.append(("config.json", beside))
    return receive(sent, folder / "work", IntakeLimits())


def test_blocks_that_become_more_bytes_than_an_upload_may_have_are_refused(tmp_path: Path) -> None:
    eight = quantize(np.ones((32, 320), np.float32), GGMLQuantizationType.Q8_0)
    tensors = {f"blk.0.attn_v.weight.lora_{half}": (eight[:, :34], GGMLQuantizationType.Q8_0) for half in "ab"}
    path = write(tmp_path / "x.gguf", tensors)
    for limit in (8192, 8191):
        assert path.stat().st_size < limit
        sent, work = [("adapter.gguf", path)], tmp_path / str(limit)
        if limit == 8192:
            receive(sent, work, IntakeLimits(max_bytes=limit))
        else:
            with pytest.raises(TooLarge, match="more than 8191 bytes as a PEFT adapter"):
                receive(sent, work, IntakeLimits(max_bytes=limit))


def test_what_is_transposed_counts_as_often_as_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.ones((64, 2), np.float16), np.ones((16, 2), np.float16)
    path = write(tmp_path / "x.gguf", {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b})
    monkeypatch.setattr(gguf_intake, "_MOST_AT_ONCE", 3 * 4 * a.size)
    take_in(tmp_path / "held", path, None)
    monkeypatch.setattr(gguf_intake, "_MOST_AT_ONCE", 3 * 4 * a.size - 1)
    with pytest.raises(FileBroken, match="too wide"):
        take_in(tmp_path, path, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_llama_cpps_own_table(name: str) -> None:
    family = FAMILIES[name]
    arch = next(arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == name)
    table = gguf.get_tensor_name_map(arch, 12)
    paths = [f"model.layers.11.{inner}" for inner in family.names.values()] + ["model.embed_tokens"]
    for path in [*paths, *(["lm_head"] if family.head else [])]:
        assert table.get_name(path) == family.stem(path)
        assert family.path(str(family.stem(path))) == path


def test_rows_have_the_order_of_transformers(tmp_path: Path) -> None:
    tensors = (
        pair(BLOCK, 32, 24) | pair("blk.0.attn_k.weight", 16, 24, 2, 1) | pair("blk.0.attn_v.weight", 16, 24, 3, 2)
    )
    path = write(tmp_path / "x.gguf", tensors)
    directory = take_in(tmp_path, path)
    adapter, undo = Adapter.open(directory), LlamaTensorProcessor(HEADS)
    for name in ("q", "k", "v"):
        stem = f"blk.0.attn_{name}.weight"
        a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        expected = undo.process(b @ a, stem).weights * (6.0 / len(a))
        found = adapter[f"model.layers.0.self_attn.{name}_proj"]
        np.testing.assert_allclose((found.scaling * found.B @ found.A).numpy(), expected, rtol=1e-5, atol=1e-5)
    manifest = inspect(directory)
    assert (manifest.format, manifest.mergeable, manifest.rank) == ("peft", True, 3)
    assert "taken in as a PEFT adapter" in manifest.report.warnings[0]
    assert manifest.config["task_type"] == "CAUSAL_LM"
    assert sorted(entry.path for entry in manifest.files) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    ]


def test_a_family_without_another_order_needs_no_configuration(tmp_path: Path) -> None:
    tensors = pair(BLOCK, 32, 24)
    directory = take_in(tmp_path, write(tmp_path / "x.gguf", tensors, "qwen2", alpha=None), None)
    found = Adapter.open(directory)["model.layers.0.self_attn.q_proj"]
    assert np.array_equal(found.B.numpy(), tensors[f"{BLOCK}.lora_b"])
    assert found.scaling == 1.0  # as llama.cpp scales where there is no alpha
    manifest = inspect(directory)
    assert "scaling 1" in manifest.report.warnings[0]


def test_numbers_keep_their_bits(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((4, 64)).astype(np.float32)
    half, brain = rows.astype(np.float16), quantize(rows, GGMLQuantizationType.BF16)
    eight = quantize(rows, GGMLQuantizationType.Q8_0)
    b = random.standard_normal((8, 4)).astype(np.float16)
    tensors = {
        "blk.0.attn_v.weight.lora_a": half,
        "blk.0.attn_v.weight.lora_b": b,
        "blk.1.attn_v.weight.lora_a": (brain, GGMLQuantizationType.BF16),
        "blk.1.attn_v.weight.lora_b": (quantize(rows[:, :4], GGMLQuantizationType.BF16), GGMLQuantizationType.BF16),
        "blk.2.attn_v.weight.lora_a": (eight, GGMLQuantizationType.Q8_0),
        "blk.2.attn_v.weight.lora_b": b,
    }
    stored = take_in(tmp_path, write(tmp_path / "x.gguf", tensors), None) / "adapter_model.safetensors"
    raw = Adapter.open(stored.parent)
    prefix = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    assert np.array_equal(raw.tensor(prefix.format(0, "A")).numpy().view(np.uint16), half.view(np.uint16))
    assert raw.tensor(prefix.format(1, "A")).dtype == torch.bfloat16
    assert raw.tensor(prefix.format(1, "A")).view(torch.uint8).numpy().tobytes() == brain.tobytes()
    dequantised = gguf.quants.dequantize(eight, GGMLQuantizationType.Q8_0)
    assert np.array_equal(raw.tensor(prefix.format(2, "A")).numpy(), dequantised)
    assert raw.tensor(prefix.format(2, "B")).dtype == torch.float32


def test_an_embedding_is_transposed_and_norms_are_left_out(tmp_path: Path) -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(6, 2), np.ones((4, 2), np.float32)
    tensors = {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b, "blk.0.attn_norm.weight": b[:, 0].copy()}
    directory = take_in(tmp_path, write(tmp_path / "x.gguf", tensors, "gemma3"), None)
    stored = load_file(directory / "adapter_model.safetensors")
    assert np.array_equal(stored["base_model.model.model.embed_tokens.lora_embedding_A"], a.T)
    assert len(stored) == 2
    assert any("1 tensors of norms were left out" in text for text in inspect(directory).report.warnings)


@pytest.mark.parametrize(
    ("tensors", "options", "config", "error", "words"),
    [
        (pair(BLOCK, 32, 24), {}, None, ConfigRefused, "config.json of the base model is missing"),
        (pair(BLOCK, 32, 24), {}, {"num_attention_heads": 5}, ConfigRefused, "not those of 5 heads"),
        (pair(BLOCK, 32, 24), {}, {}, ConfigRefused, "num_attention_heads is None"),
        (pair(BLOCK, 32, 24), {"type": "model"}, None, FormatUnknown, "holds no adapter"),
        (pair(BLOCK, 32, 24), {"adapter_type": "x"}, None, FormatUnknown, "of the type 'x'"),
        (pair(BLOCK, 32, 24), {"architecture": "mamba"}, None, FormatUnknown, "architecture 'mamba'"),
        (pair(BLOCK, 32, 24), {"adapter__alora__invocation_tokens": [1, 2]}, None, FormatUnknown, "activated LoRA"),
        (pair(BLOCK, 32, 24), {"alpha": -1.0}, HEADS, FileBroken, "alpha is -1.0"),
        (pair("blk.0.ffn_gate_exps.weight", 8, 8), {}, None, FormatUnknown, "'blk.0.ffn_gate_exps' the first"),
        ({f"{BLOCK}.lora_a": np.ones((2, 4), np.float32)}, {}, None, FileBroken, "lora_b is missing"),
        ({BLOCK: np.ones((2, 4), np.float32)}, {}, None, FileBroken, "no factor of a LoRA"),
        (
            {f"{BLOCK}.lora_a": np.ones((2, 4), np.float32), f"{BLOCK}.lora_b": np.ones((4, 3), np.float32)},
            *({}, None, FileBroken, "their ranks differ"),
        ),
        ({"blk.0.attn_v.weight.lora_a": np.ones((1, 2, 4), np.float32)}, {}, None, FileBroken, "lora_b is missing"),
        (pair("blk.0.attn_v.weight", 8, 256), {"quantised": True}, None, FileBroken, "in the encoding Q4_0"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, tensors: dict[str, Any], options: dict[str, Any], config: Any, error: type[Exception], words: str
) -> None:
    if options.pop("quantised", False):
        name = "blk.0.attn_v.weight.lora_a"
        tensors = {**tensors, name: (quantize(tensors[name], GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)}
    with pytest.raises(error, match=words):
        take_in(tmp_path, write(tmp_path / "x.gguf", tensors, **options), config)
    assert not (tmp_path / "work" / "adapter").exists()


def small() -> bytes:
    """A whole file of one pair."""
    entries = [("blk.0.attn_v.weight.lora_a", "F32", (2, 4)), ("blk.0.attn_v.weight.lora_b", "F16", (3, 2))]
    values: dict[str, str | float] = {"general.architecture": "qwen2", "general.type": "adapter", "x": 1.5}
    return gguf_head(values, entries) + bytes(32) + bytes(12) + padding(12)


def test_what_is_written_is_what_llama_cpps_library_reads(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(small())
    reader, header = gguf.GGUFReader(tmp_path / "x.gguf"), read_gguf_header(tmp_path / "x.gguf")
    assert reader.fields["general.type"].contents() == header.values["general.type"] == "adapter"
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(int(side) for side in reversed(tensor.shape))
        assert (found.begin, found.end - found.begin) == (tensor.data_offset, tensor.n_bytes)


def with_list(kind: int, count: int) -> bytes:
    """A header whose only value is a list."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<IIQ", 9, kind, count) + bytes(64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (small()[:8] + struct.pack("<QQ", 2**63, 3) + small()[24:], "claims 9223372036854775808 tensors"),
        (small()[:8] + struct.pack("<QQ", 2, 2**60) + small()[24:], "claims 1152921504606846976 values"),
        (small()[:24] + struct.pack("<Q", 2**62) + small()[32:], "claims 4611686018427387904 bytes"),
        (small()[:8] + struct.pack("<QQ", 2, 10_001) + small()[24:] + bytes(200_000), "at most 10000 are accepted"),
        (small()[:8] + struct.pack("<QQ", 100_001, 3) + small()[24:] + bytes(10**7), "at most 100000 are accepted"),
        (small()[:8] + struct.pack("<QQ", 900, 3) + small()[24:], "900 tensors; that many do not fit"),
        (with_list(8, 2_000_000), "2000000 elements of 'x'; at most"),
        (with_list(10, 2**61), "ends inside of 'x'"),
        (with_list(8, 99), "99 elements of 'x'; that many do not fit"),
        (with_list(9, 1), "'x' is a list of the type 9"),
        (small()[:-40], "Truncated"),
        (small() + bytes(33), "33 bytes follow"),
        (small()[:-150], "ends inside of"),
        (small().replace(b"lora_b", b"lora_a"), "twice"),
        (b"GGUF" + struct.pack("<I", 3 << 24) + small()[8:], "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + small()[8:], "version 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_header_is_refused_before_anything_is_made_of_it(content: bytes, words: str) -> None:
    with pytest.raises(RankwiseError, match=words):
        parse_gguf_header(content, len(content))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_bytes_brings_the_reader_down(data: st.DataObject) -> None:
    content = bytearray(small())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 9))
        width = data.draw(st.sampled_from([1, 4, 8]))
        content[at : at + width] = data.draw(st.binary(min_size=width, max_size=width))
    try:
        header = parse_gguf_header(bytes(content), len(content))
    except RankwiseError:
        return
    assert all(tensor.end <= len(content) for tensor in header.tensors.values())
