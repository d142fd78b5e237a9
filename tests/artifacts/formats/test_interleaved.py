"""torchtune's and Mistral's own names: rows of queries and keys in another order, scalings in a file beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.adapter import Adapter
from artifacts.errors import ConfigRefused, FileBroken, FormatUnknown
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.pair_numbers import factors
from artifacts.safetensors_header import read_header

HEAD, HEADS, RANK = 6, 2, 3
TUNE = {"r": RANK, "lora_alpha": 12, "model_type": "llama", "head_dim": HEAD}
PARAMS = {"dim": 12, "n_heads": HEADS, "head_dim": HEAD, "lora": {"enable": True, "rank": RANK, "scaling": 4.0}}
NAMES = {
    "torchtune": ("adapter_config.json", TUNE, "layers.1.attn.{}", ("q_proj", "k_proj", "v_proj", "output_proj")),
    "mistral": ("params.json", PARAMS, "layers.1.attention.{}", ("wq", "wk", "wv", "wo")),
}
ENDS = {"torchtune": ("lora_a.weight", "lora_b.weight"), "mistral": ("lora_A.weight", "lora_B.weight")}


def write(folder: Path, kind: str, document: Any = None, *, rank: int = RANK, d_out: int = HEAD * HEADS) -> Path:
    """A directory with the four projections of attention, and the gate of the MLP."""
    torch.manual_seed(0)
    name, standard, stem, parts = NAMES[kind]
    gate = "layers.1.mlp.w1" if kind == "torchtune" else "layers.1.feed_forward.w1"
    tensors = {}
    for module in (*(stem.format(part) for part in parts), gate):
        tensors[f"{module}.{ENDS[kind][0]}"] = torch.randn(rank, 12)
        tensors[f"{module}.{ENDS[kind][1]}"] = torch.randn(d_out, rank)
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "lora.safetensors"))
    if document != "none":
        (folder / name).write_text(json.dumps(standard if document is None else document))
    return folder


def rotated(x: torch.Tensor, angle: torch.Tensor, side_by_side: bool) -> torch.Tensor:
    """Rotary embedding of heads (heads, HEAD): pairs are (0, 1), (2, 3), …, or (0, HEAD/2), (1, HEAD/2 + 1), …"""
    first, second = (x[:, 0::2], x[:, 1::2]) if side_by_side else x.chunk(2, dim=1)
    turned = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    return torch.stack(turned, 2).flatten(1) if side_by_side else torch.cat(turned, 1)


@pytest.mark.parametrize("kind", list(NAMES))
def test_attention_scores_are_those_of_the_first_implementation(tmp_path: Path, kind: str) -> None:
    adapter = Adapter.open(write(tmp_path, kind))
    _, _, stem, parts = NAMES[kind]
    x, angle = torch.randn(12), torch.rand(HEAD // 2)

    def scores(query: torch.Tensor, key: torch.Tensor, side_by_side: bool) -> torch.Tensor:
        q = rotated((query @ x).view(HEADS, HEAD), angle, side_by_side)
        k = rotated((key @ x).view(HEADS, HEAD), 2 * angle, side_by_side)
        return (q * k).sum(1)

    def stored(part: str) -> torch.Tensor:
        down, up = (adapter.tensor(f"{stem.format(part)}.{end}") for end in ENDS[kind])
        return 4.0 * up @ down

    here = {path: found.scaling * found.B @ found.A for path, found in adapter.items()}
    block = "model.layers.1.self_attn"
    wanted = scores(stored(parts[0]), stored(parts[1]), True)
    torch.testing.assert_close(scores(here[f"{block}.q_proj"], here[f"{block}.k_proj"], False), wanted)
    torch.testing.assert_close(here[f"{block}.v_proj"], stored(parts[2]))
    torch.testing.assert_close(here[f"{block}.o_proj"], stored(parts[3]))
    assert here.keys() == {*(f"{block}.{n}_proj" for n in "qkvo"), "model.layers.1.mlp.gate_proj"}


@pytest.mark.parametrize("kind", list(NAMES))
def test_downloads_have_the_same_factors(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "sent", kind)
    upload = [(path.name, path) for path in folder.iterdir()]
    directory = receive(upload, tmp_path / "work", IntakeLimits())
    manifest = inspect(directory)
    assert (manifest.format, manifest.mergeable, manifest.report.dropped_files) == (kind, True, ())
    weights = folder / "lora.safetensors"
    infos, raw = read_header(weights).tensors, weights.read_bytes()
    adapter = Adapter.open(directory)
    for module in manifest.modules:
        found = adapter[module.path]
        A, B = factors(module, lambda key: (infos[key], raw[infos[key].begin : infos[key].end]))
        assert (found.A.numpy() == A).all()
        assert (found.B.numpy() == B).all()


def test_another_size_of_heads_is_another_adapter(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(rows), "torchtune", {**TUNE, "head_dim": rows}) for rows in (HEAD, 4)]
    first, second = (inspect(folder) for folder in folders)
    assert first.weights_digest == second.weights_digest
    assert first.identity_digest != second.identity_digest


def test_qwen_in_torchtune_has_the_order_of_transformers(tmp_path: Path) -> None:
    adapter = Adapter.open(write(tmp_path, "torchtune", {"r": RANK, "lora_alpha": 6, "model_type": "qwen2"}))
    assert all(module.plain and module.scaling == 2.0 for module in adapter.modules.values())


@pytest.mark.parametrize(
    ("kind", "document", "words"),
    [
        ("torchtune", "none", "adapter_config.json is missing: it looks like a torchtune LoRA"),
        ("torchtune", {**TUNE, "model_type": "gemma"}, "model_type is gemma"),
        ("torchtune", {"r": RANK, "lora_alpha": 12, "model_type": "llama"}, "head_dim is None"),
        ("torchtune", {**TUNE, "lora_alpha": None}, "lora_alpha is None"),
        ("torchtune", {**TUNE, "head_dim": 3}, "head_dim is 3: the rows"),
        ("mistral", "none", "params.json is missing"),
        ("mistral", {"head_dim": HEAD}, "params.json has no lora"),
        ("mistral", {"head_dim": HEAD, "lora": {"rank": RANK}}, "lora.scaling is None"),
        ("mistral", {"lora": {"rank": RANK, "scaling": 2.0}}, "head_dim is None"),
    ],
)
def test_nothing_is_guessed(tmp_path: Path, kind: str, document: Any, words: str) -> None:
    with pytest.raises(ConfigRefused, match=words):
        Adapter.open(write(tmp_path, kind, document))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileBroken, match="of rank 2, the configuration tells 3"):
        Adapter.open(write(tmp_path, "mistral", rank=2))
    with pytest.raises(FileBroken, match="9 rows are not heads of 6 rows"):
        Adapter.open(write(tmp_path, "mistral", d_out=9))


def test_prefixed_names_without_a_configuration_are_not_given_a_scaling(tmp_path: Path) -> None:
    prefix = "base_model.model.layers.0.attention.wq"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(4, 2)}, tmp_path / "x"
    )
    with pytest.raises((ConfigRefused, FormatUnknown)):
        Adapter.open(tmp_path / "x")
