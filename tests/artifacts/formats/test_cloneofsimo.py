"""cloneofsimo/lora. The trap: layers are numbered, in an order that is not that of today's diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.errors import FileBroken, FormatUnknown
from artifacts.formats import architectures
from artifacts.intake import IntakeLimits, inspect, receive

OLD = ("attn1", "ff.net.0", "attn2")
NEW = ("attn1", "attn2", "ff.net.0")


class CrossAttention(torch.nn.Module):
    """The four linear layers, registered as diffusers has always registered them."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k = linear(width, width), linear(context, width)
        self.to_v, self.to_out = linear(context, width), torch.nn.ModuleList([linear(width, width)])


class GEGLU(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = linear(width, 8 * width)


def linear(d_in: int, d_out: int) -> torch.nn.Linear:
    return torch.nn.Linear(d_in, d_out, bias=False, device="meta")


def unet(order: tuple[str, ...], parts: tuple[str, ...], name: str = "sd1") -> torch.nn.Module:
    """A skeleton of Stable Diffusion's UNet of that day: its attention, registered in that order."""
    known = architectures.architecture(name)
    root = torch.nn.Module()
    stems = dict.fromkeys(path.partition(".attn1.")[0] for path in known.modules if ".attn1." in path)
    for stem in [stem for part in parts for stem in stems if stem.startswith(part)]:
        width, context = known.modules[f"{stem}.attn1.to_q"][1], known.modules[f"{stem}.attn2.to_k"][1]
        for block in order:
            made = (
                GEGLU(width)
                if block.startswith("ff")
                else CrossAttention(width, context if block == "attn2" else width)
            )
            parent = root
            *above, last = f"{stem}.{block}".split(".")
            for level in above:
                if level not in parent._modules:
                    parent.add_module(level, torch.nn.Module())
                parent = parent.get_submodule(level)
            parent.add_module(last, made)
    return root


def saved(model: torch.nn.Module, component: str = "unet", rank: int = 1) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The file that the library saves: walk the classes in the model's order. And number → path, by hand."""
    tensors, paths = {}, {}
    for ancestor, module in model.named_modules():
        if type(module).__name__ not in ("CrossAttention", "Attention", "GEGLU", "CLIPAttention"):
            continue
        for name, child in module.named_modules():
            if isinstance(child, torch.nn.Linear):
                number = len(paths)
                paths[number] = f"{ancestor}.{name}"
                tensors[f"{component}:{number}:up"] = torch.full((child.out_features, rank), float(number + 1))
                tensors[f"{component}:{number}:down"] = torch.ones(rank, child.in_features)
    return tensors, paths


def take_in(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "x.safetensors", {"unet": '["CrossAttention", "GEGLU"]'})
    return receive([("x.safetensors", folder / "x.safetensors")], folder / "work", IntakeLimits())


@pytest.mark.parametrize("order", [OLD, NEW, ("attn1", "attn2")])
@pytest.mark.parametrize(
    "parts", [("down_blocks", "up_blocks", "mid_block"), ("down_blocks", "mid_block", "up_blocks")]
)
def test_the_order_is_told_by_the_shapes(tmp_path: Path, order: tuple[str, ...], parts: tuple[str, ...]) -> None:
    tensors, paths = saved(unet(order, parts))
    directory = take_in(tmp_path, tensors)
    stored = load_file(directory / "adapter_model.safetensors")
    assert len(stored) == len(tensors) == 2 * len(paths)
    for number, path in paths.items():
        assert float(stored[f"unet.{path}.lora_B.weight"][0, 0]) == number + 1
    manifest = inspect(directory)
    assert (manifest.format, manifest.mergeable, manifest.report.facts.architecture) == ("diffusers", True, "sd1")
    assert {module.scaling for module in manifest.modules} == {1.0}
    assert "numbered, not named" in manifest.report.warnings[0]


def test_the_text_encoder_has_transformers_order(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, hidden_size=768, num_attention_heads=12))
    tensors, paths = saved(encoder, "text_encoder")
    stored = load_file(take_in(tmp_path, tensors) / "adapter_model.safetensors")
    assert len(paths) == 48
    for number, path in paths.items():
        path = path if path.startswith("text_model.") else f"text_model.{path}"
        assert float(stored[f"text_encoder.{path}.lora_B.weight"][0, 0]) == number + 1


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["unet:3:down"]


def shorter(tensors: dict[str, Tensor]) -> None:
    for number in range(140, 144):
        del tensors[f"unet:{number}:up"], tensors[f"unet:{number}:down"]


def convolution(tensors: dict[str, Tensor]) -> None:
    tensors["unet:3:down"] = torch.ones(1, 320, 1, 1)


def exchanged(tensors: dict[str, Tensor]) -> None:
    for half in ("up", "down"):
        first, second = f"unet:4:{half}", f"unet:0:{half}"
        tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (missing, FileBroken, "unet:3 needs up and down; the file has up"),
        (shorter, FormatUnknown, "fit no order"),
        (convolution, FormatUnknown, "unet:3 is no linear layer"),
        (exchanged, FormatUnknown, "fit no order"),
    ],
)
def test_nothing_is_guessed(tmp_path: Path, change: Callable[[Any], None], error: type[Exception], words: str) -> None:
    tensors, _ = saved(unet(OLD, ("down_blocks", "up_blocks", "mid_block")))
    change(tensors)
    with pytest.raises(error, match=words):
        take_in(tmp_path, tensors)
