"""Forms whose tensors or numbers do not go together are refused in words; what is not finite is never published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.errors import FileBroken, MergeRefused
from merge.base_weights import BaseWeights
from merge.conversion import convert_to_lora
from merge.foreign_forms import ForeignForm
from merge.nearest_lora import of_factors

Tensors = dict[str, Tensor]
Q = "base_model.model.layers.0.q_proj"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LOHA: Tensors = {f"hada_w{n}_{part}": numbers(*shape) for n in "12" for part, shape in
                 (("a", (6, 2)), ("b", (2, 8)))}  # fmt: skip
ADALORA: Tensors = {"lora_A": numbers(2, 8), "lora_B": numbers(6, 2), "lora_E": numbers(2, 1)}
PACKED: Tensors = {f"{name}_{part}": numbers(*shape) for name in ("lora", "start") for part, shape in
                   (("A", (2, 8)), ("B", (6, 2)))}  # fmt: skip


def saved(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file({f"{Q}.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **config}))
    return folder


OF_LOHA: dict[str, Any] = {"peft_type": "LOHA", "r": 2, "alpha": 2}
OF_ADALORA: dict[str, Any] = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2}
OF_PACKED: dict[str, Any] = {"peft_type": "RANKWISE_LQ_LORA", "r": 2, "lora_alpha": 2}
NUMBERS: list[tuple[Tensors, dict[str, Any], str]] = [
    (LOHA, {**OF_LOHA, "r": 0}, "r of the configuration is 0; what is converted has it above 0."),
    (LOHA, {**OF_LOHA, "alpha": "x"}, "alpha of the configuration is no number."),
    (LOHA, {**OF_LOHA, "alpha": [1]}, "alpha of the configuration is no number."),
    (LOHA, {**OF_LOHA, "alpha": None}, "alpha of the configuration is no number."),
    (LOHA, {"peft_type": "LOHA", "r": 2}, "alpha of the configuration is no number."),
    (LOHA, {**OF_LOHA, "rank_pattern": [1]}, "rank_pattern of the configuration is no object."),
    (LOHA, {**OF_LOHA, "rank_pattern": {"q_proj": 0}}, "rank_pattern of layers.0.q_proj of the configuration is 0;"),
    (LOHA, {**OF_LOHA, "rank_pattern": {"q_proj": "a"}}, "rank_pattern of layers.0.q_proj of the configuration is no"),
    (ADALORA, {**OF_ADALORA, "init_r": "x"}, "init_r of the configuration is no number."),
    (ADALORA, {**OF_ADALORA, "init_r": None}, "init_r of the configuration is no number."),
    (ADALORA, {**OF_ADALORA, "init_r": -1e-5}, "init_r of the configuration is -1e-05;"),
    (ADALORA, {**OF_ADALORA, "lora_alpha": True}, "lora_alpha of the configuration is no number."),
    (PACKED, {**OF_PACKED, "r": 0}, "r of the configuration is 0;"),
    (PACKED, {**OF_PACKED, "lora_alpha": "x"}, "lora_alpha of the configuration is no number."),
]


@pytest.mark.parametrize("number", range(len(NUMBERS)))
def test_numbers_of_a_configuration(tmp_path: Path, number: int) -> None:
    tensors, config, told = NUMBERS[number]
    with pytest.raises(MergeRefused) as caught:
        convert_to_lora(saved(tmp_path / "adapter", tensors, **config), tmp_path / "out")
    assert caught.value.detail.startswith(told)


def test_a_pattern_of_a_module_counts_more_than_the_rest(tmp_path: Path) -> None:
    for name, config in (("all", {"alpha": 6}), ("one", {"alpha_pattern": {"q_proj": 6}})):
        convert_to_lora(saved(tmp_path / name, LOHA, **{**OF_LOHA, **config}), tmp_path / f"{name} out")
    stored = [(tmp_path / f"{name} out" / "adapter_model.safetensors").read_bytes() for name in ("all", "one")]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    "shapes", [((1, 8), (8, 2), (2, 1)), ((2, 8), (6, 1), (2, 1)), ((2, 8), (6, 2), (1, 1)), ((2, 8), (6, 2), (2,))]
)
def test_singular_values_of_another_rank(tmp_path: Path, shapes: tuple[tuple[int, ...], ...]) -> None:
    A, B, E = (numbers(*shape) for shape in shapes)
    folder = saved(tmp_path / "adapter", {"lora_A": A, "lora_B": B, "lora_E": E}, **OF_ADALORA)
    with pytest.raises(FileBroken, match="are no product of one rank"):
        convert_to_lora(folder, tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_not_finite(tmp_path: Path, rank: int | None) -> None:
    folder = saved(tmp_path / "adapter", LOHA, **{**OF_LOHA, "r": 1e-20, "alpha": 1e18})
    with pytest.raises(MergeRefused, match="is not finite"):
        convert_to_lora(folder, tmp_path / "out", rank=rank)
    with pytest.raises(FileBroken, match="of the ranks 2 and 3"):
        of_factors("q", numbers(2, 8), numbers(6, 3), rank)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    save_file({name: numbers(320, 320)}, tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "shapes",
    [
        ((320, 2), (3, 320), (320, 2), (2, 320)),
        ((320, 2), (2, 320), (320, 2), (3, 320)),
        ((2, 320), (320, 3), (2, 320), (320, 2)),
        ((320, 2), (2, 300), (320, 2), (2, 320)),
    ],
)
def test_a_glora_of_unequal_ranks(tmp_path: Path, pipeline: Path, shapes: tuple[tuple[int, int], ...]) -> None:
    names = ("a1", "a2", "b1", "b2")
    tensors = {f"{K}.{name}.weight": numbers(*shape) for name, shape in zip(names, shapes, strict=True)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises((FileBroken, MergeRefused), match=r"are no two products|b1 and b2 of shapes"):
        convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out", base=pipeline)


def test_a_difference_without_rows(tmp_path: Path) -> None:
    save_file({f"{K}.diff": torch.zeros(0, 320)}, tmp_path / "x.safetensors")
    with pytest.raises((FileBroken, MergeRefused)):
        convert_to_lora(tmp_path / "x.safetensors", tmp_path / "out")


def test_rows_that_a_weight_has_not(pipeline: Path) -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    parts = {"weight": torch.ones(320), "on_input": torch.ones(1)}
    form = ForeignForm(path, "ia3", parts, 1.0, 0.0, 0, rows=((160, 320),), siblings=(path,))
    assert form.change(BaseWeights(pipeline)).value.shape == (160, 320)  # type: ignore[union-attr]
    wide = ForeignForm(path, "ia3", parts, 1.0, 0.0, 0, rows=((160, 321),), siblings=(path,))
    with pytest.raises(MergeRefused, match="more rows than the 320"):
        wide.change(BaseWeights(pipeline))
