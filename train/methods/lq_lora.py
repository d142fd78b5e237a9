"""LQ-LoRA (arXiv:2311.12023): the factors of a base model in a few bits are trained, its packed weights stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import nn

from artifacts.errors import FieldError, FileBroken, RequestInvalid
from artifacts.quantised_base import NOTES_NAME, START_NAME
from train import declared
from train.adapted_layers import AdaptedLinear, LowRank
from train.lq_layer import LqLinear
from train.methods.own_adapter import OwnMethod
from train.options.lq_lora import LqLoraOptions
from train.protocol import MethodContext
from train.quantised.packed_linear import PackedLinear

TYPE = "RANKWISE_LQ_LORA"


class LqLora(OwnMethod[LqLoraOptions]):
    """The export is no plain LoRA of the original base model: Q + scaling·B·A − W has full rank."""

    begins_prepared: ClassVar[bool] = True

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(model)  # else the Trainer takes nothing in it for trainable
        prepared = super().prepare(model, context)
        self._folder = Path(context.base_location)
        if context.checkpoint is None:
            self._begin(self._folder / START_NAME)
        return prepared

    def layer(self, path: str, base: nn.Module) -> LqLinear:
        if not isinstance(base, PackedLinear):
            problem = f"{path} is not quantised"
            raise RequestInvalid(
                f"{problem}.",
                hint="Make the base model with POST /models/{id}/quantize.",
                errors=[FieldError("/base_model", problem)],
            )
        assert self.options.rank is not None
        return LqLinear(base, self.options.rank, self.options.alpha / self.options.rank)

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """The factors beside Q; on W they are not the adapter."""
        assert isinstance(layer, LqLinear)
        return LowRank(layer.lora_A, layer.lora_B, layer.scaling)

    def report(self, model: nn.Module) -> dict[str, Any]:
        packed = [layer.packed for layer in self._own()]
        weights = sum(layer.in_features * layer.out_features for layer in packed)
        resident = sum(buffer.numel() * buffer.element_size() for layer in packed for buffer in layer.buffers())
        export = {
            "form": "lq_lora",
            "exact": True,
            "rank": self.options.rank,
            "loads_with": f"{declared.LOADER} of Rankwise",
            "valid_on": "the quantised base model only",
        }
        quantisation = {
            "bits_per_weight": 8 * sum(layer.matrix.counted_bytes for layer in packed) / weights,
            "resident_bytes": resident,
        }
        return {"quantisation": quantisation, "export": export}

    def export(self, model: nn.Module, directory: Path) -> None:
        notes = json.loads((self._folder / NOTES_NAME).read_text(encoding="utf-8"))
        config = {
            "r": self.options.rank,
            "lora_alpha": self.options.alpha,
            "packed_weights": {layer.packed.stored_path: layer.packed.identity() for layer in self._own()},
            "quantised_from": notes.get("base_model"),
            "quantisation_error": notes.get("relative_error"),
            "base_model_name_or_path": self.base_name,
            "task_type": self.context.task_type,
            "modules_to_save": list(self.context.whole) or None,
        }
        declared.write(directory, TYPE, self.layers, self.whole_tensors(model), config)

    def reload(self, base: nn.Module, directory: Path) -> nn.Module:
        return declared.load(base, directory)

    def _own(self) -> list[LqLinear]:
        return [layer for layer in self.layers.values() if isinstance(layer, LqLinear)]

    def _begin(self, path: Path) -> None:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            for layer in self._own():
                left, right = f"{layer.packed.stored_path}.L1", f"{layer.packed.stored_path}.L2"
                if not {left, right} <= names:
                    raise FileBroken(f"{path.name} of the base model has no factors of {layer.packed.stored_path}.")
                layer.begin(stored.get_tensor(left), stored.get_tensor(right))
