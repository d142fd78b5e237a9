"""Teaches transformers' `from_pretrained` the folders of quantised base models: weights stay packed from the disk on.

Importing this module is what teaches it. A program that does not import it finds no weights for these layers:
transformers then warns that the quantisation is unknown and the weights are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from artifacts.quantised_base import METHOD
from train.adapted_layers import exchange
from train.quantised.block_format import CODEBOOK, BlockFormat
from train.quantised.packed_linear import PackedLinear


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of the quantised layers."""

    def __init__(self, layers: Mapping[str, Any], rank: int, codebook: str = CODEBOOK, **_: Any) -> None:
        if codebook != CODEBOOK:
            raise ValueError(f"the codebook {codebook!r} is not known; this version has {CODEBOOK}")
        self.quant_method = METHOD
        self.codebook = codebook
        self.rank = rank
        self.layers = dict(layers)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a `PackedLinear` where each quantised layer is, before the stored tensors are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        modules = dict(model.named_modules())
        prefix = str(getattr(model, "base_model_prefix", ""))
        for path, told in self.quantization_config.layers.items():
            names = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))
            found = next((name for name in names if name in modules), None)
            if found is None:
                continue  # of a part that this class does not have, such as a pooler
            layer, (d_out, d_in) = modules[found], told["shape"]
            sides = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
            if sides != (d_out, d_in):
                raise ValueError(f"{path} is quantised as {d_out}×{d_in}, and the model's layer is {sides}")
            bias = getattr(layer, "bias", None)
            with torch.device("meta"):
                packed = PackedLinear(d_out, d_in, BlockFormat.of(told["format"]), bias=bias, stored_path=path)
            exchange(model, found, packed)

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the packed weights are."""
        return True

    def is_serializable(self) -> bool:
        """By `train.quantised.folder`, not by save_pretrained."""
        return False
