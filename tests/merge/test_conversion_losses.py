"""What a plain LoRA would lose of an adapter keeps it from being converted, whatever its type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.errors import MergeRefused
from artifacts.layout import read_layout
from artifacts.refusals import lasting
from merge.conversion import convert_to_lora

Tensors = dict[str, Tensor]
Q = "base_model.model.layers.0.q_proj"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DORA: Tensors = {"lora_A.weight": numbers(2, 8), "lora_B.weight": numbers(6, 2), "lora_magnitude_vector": numbers(6)}
ADALORA: Tensors = {"lora_A": numbers(2, 8), "lora_B": numbers(6, 2), "lora_E": numbers(2, 1)}
PEFT_LOHA: Tensors = {
    f"hada_w{n}_{part}": numbers(*shape) for n in "12" for part, shape in (("a", (6, 2)), ("b", (2, 8)))
}
OF_DORA = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 2}
OF_ADALORA = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2}
OF_LOHA = {"peft_type": "LOHA", "r": 2, "alpha": 2}
OF_PACKED = {"peft_type": "RANKWISE_LQ_LORA", "r": 2, "lora_alpha": 2}
PACKED: Tensors = {f"{name}_{part}": numbers(*shape) for name in ("lora", "start") for part, shape in
                   (("A", (2, 8)), ("B", (6, 2)))}  # fmt: skip

PEFT: dict[str, tuple[dict[str, Any], Tensors, Tensors, str]] = {
    "a PiSSA": ({**OF_DORA, "init_lora_weights": "pissa"}, DORA, {}, "init_lora_weights is 'pissa'"),
    "an OLoRA": ({**OF_DORA, "init_lora_weights": "olora"}, DORA, {}, "init_lora_weights is 'olora'"),
    "biases of the base": ({**OF_DORA, "bias": "lora_only"}, DORA, {f"{Q}.bias": numbers(6)}, "bias is set"),
    "part of a LoHa": (OF_DORA, DORA, {f"{Q}.hada_w1_a": numbers(6, 2)}, "stand beside factors"),
    "a bias beside AdaLoRA": (OF_ADALORA, ADALORA, {f"{Q}.bias": numbers(6)}, "has bias, which is no part"),
    "a difference beside a LoHa": (OF_LOHA, PEFT_LOHA, {f"{Q}.diff": numbers(6, 8)}, "has diff, which is no part"),
    "a bias beside packed weights": (OF_PACKED, PACKED, {f"{Q}.bias": numbers(6)}, "has bias, which is no part"),
    "outside the prefix": (OF_LOHA, PEFT_LOHA, {"layers.1.q_proj.hada_w1_a": numbers(6, 2)}, "stands outside"),
}


@pytest.mark.parametrize("name", PEFT)
def test_of_pefts_types(tmp_path: Path, name: str) -> None:
    config, parts, beside, told = PEFT[name]
    save_file({f"{Q}.{key}": value for key, value in parts.items()} | beside, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **config}))
    with pytest.raises(MergeRefused, match=told):
        convert_to_lora(tmp_path, tmp_path / "out")


PAIR: Tensors = {"lora_down.weight": numbers(2, 320), "lora_up.weight": numbers(320, 2)}
KOHYA_DORA = {**PAIR, "dora_scale": numbers(320, 1)}
LOHA: Tensors = {
    f"hada_w{n}_{part}": numbers(*shape) for n in "12" for part, shape in (("a", (320, 2)), ("b", (2, 320)))
}
LOKR: Tensors = {"lokr_w1": numbers(4, 4), "lokr_w2_a": numbers(80, 2), "lokr_w2_b": numbers(2, 80)}
FOREIGN: dict[str, tuple[Tensors, Tensors]] = {
    "DoRA and OFT": (KOHYA_DORA, {f"{K}.oft_blocks": numbers(4, 80, 80)}),
    "DoRA and what is not known": (KOHYA_DORA, {f"{K}.strange": numbers(3)}),
    "DoRA and a weight": (KOHYA_DORA, {"whatever.weight": numbers(4, 4)}),
    "LoHa and a difference": (LOHA, {f"{K}.diff": numbers(320, 320)}),
    "LoHa and what is not known": (LOHA, {f"{K}.strange": numbers(3)}),
    "LoKr and a scalar": (LOKR, {f"{K}.scalar": numbers(1)}),
    "LoKr and a difference": (LOKR, {f"{K}.diff": numbers(320, 320)}),
    "LoKr and a weight": (LOKR, {"whatever.weight": numbers(4, 4)}),
    "LoKr and a scale": (LOKR, {f"{K}.scale": numbers(4)}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_of_files_of_other_trainers(tmp_path: Path, name: str) -> None:
    parts, beside = FOREIGN[name]
    save_file({f"{K}.{key}": value for key, value in parts.items()} | beside, tmp_path / "x.safetensors")
    layout = read_layout(tmp_path / "x.safetensors")
    assert next(iter(beside)) in layout.facts.lasting[0]
    assert not layout.facts.exact_as_lora.able
    with pytest.raises(
        MergeRefused,
    ):
        convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out")


def test_the_type_alone_is_no_reason(tmp_path: Path) -> None:
    """Nor are biases, which the conversion looks at itself."""
    for name, parts in (("loha", LOHA), ("lokr", LOKR), ("pair", {**PAIR, "diff_b": torch.zeros(320)})):
        save_file({f"{K}.{key}": value for key, value in parts.items()}, tmp_path / f"{name}.safetensors")
        layout = read_layout(tmp_path / f"{name}.safetensors")
        assert layout.refusals
        assert layout.facts.lasting == lasting(layout.refusals) == ()
        assert layout.facts.exact_as_lora.able is (name == "lokr")
        convert_to_lora(tmp_path / f"{name}.safetensors", tmp_path / name)


def test_rows_of_an_embedding_beside_it_are_a_loss(tmp_path: Path) -> None:
    save_file({f"{Q}.{key}": value for key, value in PEFT_LOHA.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **OF_LOHA}))
    convert_to_lora(tmp_path, tmp_path / "out")
    save_file({"rows": numbers(2, 8)}, tmp_path / "new_embeddings.safetensors")
    with pytest.raises(MergeRefused, match="new_embeddings"):
        convert_to_lora(tmp_path, tmp_path / "again")
