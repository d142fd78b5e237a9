"""LoftQ (arXiv:2310.08659), computed with Q in the precision of the training; the adapter says how Q is had again.

PEFT's needs bitsandbytes and a GPU to start, and writes the factors without the Q that they are for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from artifacts.errors import FieldError, RequestInvalid
from train import declared
from train.adapted_layers import AdaptedLinear, LowRank
from train.loftq_layer import LoftqLinear
from train.methods.own_adapter import OwnMethod
from train.normal_float import BLOCK
from train.options.loftq import LoftqOptions
from train.protocol import MethodContext

TYPE = "RANKWISE_LOFTQ"


class Loftq(OwnMethod[LoftqOptions]):
    """The export is no plain LoRA: Q + scaling·B·A − W has full rank."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self._lost = [0.0, 0.0, 0.0]
        return super().prepare(model, context)

    def layer(self, path: str, base: nn.Module) -> LoftqLinear:
        options = self.options
        made = LoftqLinear(base, options.rank, options.numerator / options.rank, options.bits, options.iterations)
        weight = made.weight.detach().clone()
        if not bool(weight.isfinite().all()):
            problem = f"{path} has NaN or infinite weights, which can not be quantised"
            raise RequestInvalid(f"{problem}.", errors=[FieldError("/parameters/target_modules", problem)])
        if self.context.checkpoint is None:
            made.decompose()
            made.quantise()
            plain, less = made.lost(weight)
            found = (float(weight.double().square().sum()), plain, less)
            self._lost = [total + part for total, part in zip(self._lost, found, strict=True)]
        return made

    def load(self, model: nn.Module, directory: Path) -> None:
        super().load(model, directory)
        for layer in self.layers.values():
            layer.filled()

    def state(self) -> dict[str, Any]:
        return {"lost": self._lost}

    def load_state(self, state: Any) -> None:
        self._lost = list(state["lost"])

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """The factors beside Q; on W they are not the adapter."""
        assert isinstance(layer, LoftqLinear)
        return LowRank(layer.lora_A, layer.lora_B, layer.scaling)

    def report(self, model: nn.Module) -> dict[str, Any]:
        whole, plain, less = self._lost
        quantisation = {
            **self._quantisation(),
            "relative_error": math.sqrt(plain / whole) if whole else 0.0,
            "relative_error_with_factors": math.sqrt(less / whole) if whole else 0.0,
        }
        export = {
            "form": "loftq",
            "exact": True,
            "rank": self.options.rank,
            "loads_with": f"{declared.LOADER} of Rankwise, which quantises the base again",
            "valid_on": "the quantised base model only",
        }
        return {"quantisation": quantisation, "export": export}

    def export(self, model: nn.Module, directory: Path) -> None:
        config = {
            "r": self.options.rank,
            "lora_alpha": self.options.numerator,
            "quantisation": self._quantisation(),
            "base_model_name_or_path": self.base_name,
            "task_type": self.context.task_type,
            "modules_to_save": list(self.context.whole) or None,
        }
        declared.write(directory, TYPE, self.layers, self.whole_tensors(model), config)

    def reload(self, base: nn.Module, directory: Path) -> nn.Module:
        return declared.load(base, directory)

    def _quantisation(self) -> dict[str, Any]:
        options = self.options
        return {"type": "normal_float", "bits": options.bits, "block": BLOCK, "iterations": options.iterations}
