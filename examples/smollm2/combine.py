"""Two adapters combined by the plainest means, as references for the service's merges.

Both functions read PEFT directories whose adapters have the same modules, and write one that PEFT loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_A, _B = ".lora_A.weight", ".lora_B.weight"

Factors = tuple[torch.Tensor, torch.Tensor]


def concatenate_factors(first: Path, second: Path, out: Path, *, scale: float = 1.0) -> None:
    """scale·(ΔW1 + ΔW2), exactly: A's stacked by rows, B's by columns, so the rank is the sum of the ranks."""

    def combine(one: Factors, two: Factors) -> Factors:
        return torch.cat([one[0], two[0]]), scale * torch.cat([one[1], two[1]], dim=1)

    _combine(first, second, out, combine)


def average_factors(first: Path, second: Path, out: Path) -> None:
    """A = (A1 + A2)/2 and B = (B1 + B2)/2: half of ΔW1, half of ΔW2 and the cross terms B1·A2, B2·A1.

    Each factor carries the square root of its adapter's scaling. Raises ValueError when the ranks differ.
    """

    def combine(one: Factors, two: Factors) -> Factors:
        if one[0].shape != two[0].shape:
            raise ValueError(f"factors of {first} and {second} have different ranks: they have no average")
        return (one[0] + two[0]) / 2, (one[1] + two[1]) / 2

    _combine(first, second, out, combine)


def _combine(first: Path, second: Path, out: Path, combine: Callable[[Factors, Factors], Factors]) -> None:
    config, one = _read(first)
    _, two = _read(second)
    if one.keys() != two.keys():
        raise ValueError(f"{first} and {second} have different modules: {sorted(one.keys() ^ two.keys())[:4]}")
    tensors: dict[str, torch.Tensor] = {}
    rank = 0
    for module in one:
        a, b = combine(one[module], two[module])
        tensors[module + _A], tensors[module + _B] = a.contiguous(), b.contiguous()
        rank = a.shape[0]
    out.mkdir(parents=True)
    save_file(tensors, out / _WEIGHTS, metadata={"format": "pt"})
    # The factors carry the scaling already.
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Configuration, and per module the fp32 factors (A r×d_in, B d_out×r), each times √scaling."""
    config = json.loads((directory / _CONFIG).read_text())
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise ValueError(f"{directory} has ranks or alphas of its own per module, which this example does not read")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(directory / _WEIGHTS)
    modules = sorted(key.removesuffix(_A) for key in tensors if key.endswith(_A))
    root = math.sqrt(scaling)
    return config, {m: (root * tensors[m + _A].float(), root * tensors[m + _B].float()) for m in modules}
