"""A base model with an adapter of Rankwise's own types, called as a model of PEFT with one adapter is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from train import declared


class DeclaredAdapter(nn.Module):
    """The model that `train.declared.load` gave; the adapter is of a type that leaves the weights as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = model
        self.config, self.generation_config = model.config, model.generation_config

    def get_base_model(self) -> Any:
        """The model, with the adapter unless within `disable_adapter`."""
        return self.base

    def set_adapter(self, name: str) -> None:
        """There is one."""
        del name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone."""
        layers = declared.take_off(self.base)
        try:
            yield
        finally:
            declared.put_back(self.base, layers)

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the base model's."""
        return self.base(*given, **named)
