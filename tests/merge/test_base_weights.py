"""The weights of a base model, one layer at a time, of whatever its folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from artifacts.errors import FieldError, MergeRefused
from merge.base_weights import BaseWeights, needed


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    parts = {
        "unet": {"conv_in.weight": numbers(4, 3, 3, 3), "conv_in.bias": torch.zeros(4), "to_q.weight": numbers(6, 5)},
        "text_encoder": {"text_model.layers.0.fc1.weight": numbers(3, 2), "text_model.layers.0.fc1.bias": numbers(3)},
        "text_encoder_2": {"layers.0.fc1.weight": numbers(2, 3)},
        "scheduler": {"to_q.weight": numbers(6, 5)},
    }
    for part, tensors in parts.items():
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / "model.safetensors")
    save_file({"to_k.weight": numbers(2, 2)}, folder / "unet" / "other.safetensors")
    names = {**dict.fromkeys(parts["unet"], "model.safetensors"), "to_k.weight": "other.safetensors"}
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def test_parts_of_a_pipeline(pipeline: Path) -> None:
    weights = BaseWeights(pipeline)
    assert torch.equal(weights.of("unet.conv_in"), numbers(4, 3, 3, 3))
    assert torch.equal(weights.of("unet.to_q"), numbers(6, 5))
    assert torch.equal(weights.of("unet.to_k"), numbers(2, 2))
    # text encoders, with and without the name of what their class wraps, in the file and in the adapter
    for path in ("text_encoder.layers.0.fc1", "text_encoder.text_model.layers.0.fc1"):
        assert torch.equal(weights.of(path), numbers(3, 2))
        assert weights.has_bias(path)
    for path in ("text_encoder_2.layers.0.fc1", "text_encoder_2.text_model.layers.0.fc1"):
        assert torch.equal(weights.of(path), numbers(2, 3))
        assert not weights.has_bias(path)
    assert not weights.has_bias("unet.conv_in"), "it is 0"


@pytest.mark.parametrize("path", ["unet.nothing", "scheduler.to_q", "transformer.to_q", "to_q", "unet.text_model"])
def test_what_is_not_there_is_named(pipeline: Path, path: str) -> None:
    weights = BaseWeights(pipeline)
    for _ in range(2):
        with pytest.raises(MergeRefused) as caught:
            weights.of(path)
        assert caught.value.detail == f"The base model has no layer {path} whose weight could be read."
        assert list(caught.value.errors) == [FieldError("/base_model", f"has no layer {path}")]


def test_a_part_that_can_not_be_read(pipeline: Path) -> None:
    (pipeline / "unet" / "other.safetensors").write_bytes(b"no header")
    with pytest.raises(MergeRefused, match="The weights of unet of the base model: "):
        BaseWeights(pipeline).of("unet.to_q")


def test_layers_of_a_model_as_they_compute(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=32)).bfloat16()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "base")
    weights = BaseWeights(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    path = "transformer.h.0.attn.c_attn"
    name = next(key for key in stored if key.endswith("h.0.attn.c_attn.weight"))
    assert torch.equal(weights.of(path), stored[name].T.float())
    assert weights.of(path).dtype == torch.float32
    assert (weights.has_bias(path), weights.has_bias("transformer.h.0.attn.c_proj")) == (True, False)
    # the head is the embedding
    assert weights.of("lm_head").numel() == 40 * 8
    assert not weights.has_bias("lm_head")
    assert not weights.has_bias("no.such.layer")


def test_they_are_asked_for_where_they_are_needed(pipeline: Path) -> None:
    weights = BaseWeights(pipeline)
    assert needed(weights, "DoRA") is weights
    with pytest.raises(MergeRefused) as caught:
        needed(None, "DoRA")
    assert caught.value.detail == "What a DoRA adapter adds depends on the weights of its base model."
    assert list(caught.value.errors) == [FieldError("/base_model", "is needed")]
