"""Adapters of a pipeline, switched on and off: exactly, without gradients, and put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers that hold adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def activate(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Exactly these adapters act in a model: see `activate_layers`."""
    activate_layers(tuner_layers(model), weights)


def activate_layers(layers: Iterable[Any], weights: Mapping[str, float]) -> None:
    """Exactly these adapters act, each with its weight; none with no weights.

    Weights are set on every switch, because PEFT keeps those of the switch before; and nothing becomes trainable,
    which PEFT's own switch does to every adapter that it turns on.

    Args:
        layers: those of `tuner_layers`. Whoever switches in every step looks for them once: a walk through a UNet
            takes longer than the switch.
    """
    names = list(weights)
    for layer in layers:
        layer._disable_adapters = not names
        if names:
            if layer.active_adapters != names:
                layer.set_adapter(names, inference_mode=True)
            for name, weight in weights.items():
                layer.set_scale(name, weight)


def rest(model: nn.Module) -> None:
    """No adapter acts, nothing is trainable, weights are 1: how a pipeline waits."""
    for layer in tuner_layers(model):
        for name in layer.scaling:
            layer.set_scale(name, 1.0)
        layer.set_adapter([], inference_mode=True)
        layer._disable_adapters = True
    model.requires_grad_(False)


@dataclass(frozen=True, slots=True)
class _LayerState:
    """What acts in a layer, with which scaling. What is so already is not set: modules of PyTorch take long to set."""

    layer: Any
    active: str | list[str]
    disabled: bool
    scaling: dict[str, float]

    @classmethod
    def of(cls, layer: Any) -> _LayerState:
        active = layer._active_adapter
        kept = active if isinstance(active, str) else list(active)
        return cls(layer, kept, layer._disable_adapters, dict(layer.scaling))

    def restore(self) -> None:
        layer = self.layer
        if layer._active_adapter != self.active:
            layer._active_adapter = self.active if isinstance(self.active, str) else list(self.active)
        if layer._disable_adapters is not self.disabled:
            layer._disable_adapters = self.disabled
        if layer.scaling != self.scaling:
            for name in layer.scaling:
                if name in self.scaling:
                    layer.scaling[name] = self.scaling[name]


class AdapterSwitch:
    """Switches all layers of a model over and over: as `activate_layers`, which it leaves all but the first switch to
    the same adapters to what it has learnt from that one.

    Every switch looks at every layer, so that it does not matter who switched in between.

    Attributes:
        layers: those of `tuner_layers`; no adapter is loaded or unloaded as long as this is used.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._known: dict[tuple[tuple[str, float], ...], list[tuple[Any, ...]]] = {}

    def activate(self, weights: Mapping[str, float]) -> None:
        """Exactly these adapters act, each with its weight; none with no weights."""
        known = self._known.get(key := tuple(weights.items()))
        if known is None:
            activate_layers(self.layers, weights)
            states = [_LayerState.of(layer) for layer in self.layers]
            self._known[key] = [(item.layer, item.active, item.disabled, item.scaling, item) for item in states]
            return
        for layer, active, disabled, scaling, state in known:
            # written out, because most layers need nothing and every pass asks them all
            if layer.scaling != scaling or layer._active_adapter != active or layer._disable_adapters is not disabled:
                state.restore()


@contextmanager
def restored(*models: nn.Module) -> Iterator[None]:
    """Whatever happens inside: afterwards the same adapters act with the same weights, the same parameters are
    trainable, the same processors attend, and no gradient is left. Layers that came inside act no more."""
    modules = [module for model in models for module in model.modules()]
    layers = [_LayerState.of(module) for module in modules if isinstance(module, BaseTunerLayer)]
    parameters = [parameter for module in modules for parameter in module._parameters.values() if parameter is not None]
    trainable = [(parameter, parameter.requires_grad) for parameter in parameters]
    training = [(module, module.training) for module in modules]
    checkpointing = _flags(modules)
    processors: list[tuple[Any, Any]] = [
        (module, module.processor) for module in modules if hasattr(type(module), "set_processor")
    ]
    try:
        yield
    finally:
        for attention, processor in processors:
            if attention.processor is not processor:
                attention.set_processor(processor)
        for item, value in checkpointing:
            if item.gradient_checkpointing is not value:
                item.gradient_checkpointing = value
        for module, was in training:
            if module.training is not was:
                module.training = was
        known = {id(state.layer) for state in layers}
        for model in models:
            if any(id(layer) not in known for layer in tuner_layers(model)):
                rest(model)
        for state in layers:
            state.restore()
        for parameter, flag in trainable:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
            parameter.grad = None


def _flags(modules: Iterable[Any]) -> list[tuple[Any, bool]]:
    """The modules that can compute activations again, and whether they do."""
    name = "gradient_checkpointing"
    # by `vars` and the type: a module takes long to say that it has no such attribute
    found = [(module, vars(module).get(name, getattr(type(module), name, None))) for module in modules]
    return [(module, flag) for module, flag in found if isinstance(flag, bool)]


def can_mix(layers: Iterable[Any], branches: Sequence[Mapping[str, float]]) -> bool:
    """Whether these branches can run in one batch: one plain LoRA each at most, with one weight wherever it occurs.

    Args:
        layers: those of `tuner_layers`.
    """
    if any(len(branch) > 1 for branch in branches):
        return False
    weights = {(name, weight) for branch in branches for name, weight in branch.items()}
    names = {name for name, _ in weights}
    return len(weights) == len(names) and all(
        isinstance(layer, LoraLayer) and not any(layer.use_dora.get(name, False) for name in names) for layer in layers
    )


@dataclass(slots=True)
class MixedBatch:
    """Batches in which each row has a branch's own adapter: PEFT's mixed batches, without its wrapper around the model.

    Attributes:
        switch: of the model's adapters.
    """

    switch: AdapterSwitch
    _rows: list[str] | None = None
    _installed: bool = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks tell the layers of each pass which adapter each row has; once for many passes, which is cheaper."""
        handles = [layer.register_forward_pre_hook(self._choose, with_kwargs=True) for layer in self.switch.layers]
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            for handle in handles:
                handle.remove()

    @contextmanager
    def rows(self, branches: Sequence[Mapping[str, float]], repeats: int = 1) -> Iterator[None]:
        """A pass inside has these branches' rows; in `installed` only.

        Args:
            branches: as `can_mix` allows them.
            repeats: consecutive rows of one branch.
        """
        if not self._installed:
            raise AssertionError("nobody tells the layers which adapter each row has")
        weights = {name: weight for branch in branches for name, weight in branch.items()}
        self.switch.activate(weights)
        names = [next(iter(branch), "__base__") for branch in branches for _ in range(repeats)]
        self._rows = names if weights else None
        try:
            yield
        finally:
            self._rows = None

    def _choose(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        del module
        return None if self._rows is None else (args, {**kwargs, "adapter_names": self._rows})
