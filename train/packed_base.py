"""Which methods train on which base models: packed weights are for methods that know them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from artifacts.quantised_base import packed_layers
from train.menu_row import Method
from train.options.common import TrainOptions
from train.options.lq_lora import LqLoraOptions
from train.quantised.block_format import BlockFormat


def fitted(method: Method, options: TrainOptions, quantisation: Mapping[str, Any] | None) -> TrainOptions:
    """The options as they are on a base model with this `quantization_config`; with the rank of the base model.

    Raises:
        RequestInvalid: the method can not be trained on such a base model.
    """
    packed = bool(packed_layers(quantisation))
    if not isinstance(options, LqLoraOptions):
        if packed:
            problem = f"its weights are packed, on which {method.name} can not be trained"
            raise _refused(problem, "Take the method lq-lora, or the base model that it was made of.")
        return options
    if not packed or quantisation is None:
        problem = f"its weights are not packed, and {method.name} trains beside packed weights"
        raise _refused(problem, "Make one of it with POST /models/{id}/quantize, and name that.")
    rank = int(quantisation["rank"])
    if options.rank not in (None, rank):
        problem = f"rank {options.rank} is not {rank}, that of the factors of the base model"
        raise RequestInvalid(
            f"R{problem[1:]}.",
            hint="Leave it out, or quantise the original base model with another rank.",
            errors=[FieldError("/parameters/rank", problem)],
        )
    return options.model_copy(update={"rank": rank, "target_modules": "all-linear"})


def packed_bytes(quantisation: Mapping[str, Any] | None) -> dict[str, int]:
    """Path → bytes of the packed weight; empty for a base model without any."""
    found = {}
    for path, (d_out, d_in) in packed_layers(quantisation).items():
        assert quantisation is not None
        form = BlockFormat.of(quantisation["layers"][path]["format"])
        found[path] = form.bits_of(d_out * d_in) // 8 + 4
    return found


def _refused(problem: str, hint: str) -> RequestInvalid:
    return RequestInvalid(
        f"The base model can not be used: {problem}.", hint=hint, errors=[FieldError("/base_model", problem)]
    )
