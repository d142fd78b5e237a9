"""Which methods train on which base models: packed weights are for methods that know them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from artifacts.quantised_base import packed_layers
from train.menu_row import Method
from train.options.common import TrainOptions


def fitted(method: Method, options: TrainOptions, quantisation: Mapping[str, Any] | None) -> TrainOptions:
    """The options as they are on a base model with this `quantization_config`.

    Raises:
        RequestInvalid: the method can not be trained on such a base model.
    """
    if packed_layers(quantisation):
        problem = f"its weights are packed, on which {method.name} can not be trained"
        raise RequestInvalid(
            f"The base model can not be used: {problem}.",
            hint="Name the base model that it was made of.",
            errors=[FieldError("/base_model", problem)],
        )
    return options
