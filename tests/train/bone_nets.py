"""A layer with one of Bone's blocks, for the tests of its algebra and of its exports."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from train.catalog import METHODS, parse_parameters
from train.protocol import MethodContext
from train.settings import TrainingSettings

D_OUT, D_IN, R = 24, 32, 8
VARIANTS = ("default", "mini", "bat_col", "bat_row")
TOLERANCE = 1e-5


class Net(nn.Module):
    """One linear layer with a bias."""

    def __init__(self, d_in: int = D_IN, d_out: int = D_OUT) -> None:
        super().__init__()
        self.name_or_path = "acme/net"
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bone(variant: str, net: nn.Module | None = None, rank: int = R, mini_r: int = 4) -> tuple[Any, nn.Module, Any]:
    """(method, prepared model, its trained tensor D)."""
    options = parse_parameters("bone", {"variant": variant, "rank": rank, "mini_r": mini_r})
    method = METHODS["bone"].load(options)
    context = MethodContext(["linear"], 10, lambda: iter(()), TrainingSettings(), task_type=None)
    model = method.prepare(net or Net(), context)
    [block] = [value for value in model.parameters() if value.requires_grad]
    return method, model, block


def filled(variant: str, **sizes: Any) -> tuple[Any, nn.Module, Any]:
    method, model, block = bone(variant, **sizes)
    with torch.no_grad():
        block.copy_(0.3 * draw(*block.shape, seed=5))
    return method, model, block


def delta_of(model: nn.Module, d_in: int = D_IN, d_out: int = D_OUT) -> Tensor:
    """ΔW of a model that is linear in x, from its outputs alone."""
    with torch.no_grad():
        eye = torch.eye(d_in)
        return (model(eye) - Net(d_in, d_out)(eye)).T


def lora(factors: tuple[Tensor, Tensor], net: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """PEFT's LoRA with these factors and scaling 1."""
    A, B = factors
    made = get_peft_model(net or Net(), LoraConfig(r=len(A), lora_alpha=len(A), target_modules=["linear"]))
    layer = made.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    return made, layer
