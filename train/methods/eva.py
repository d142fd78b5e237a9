"""EVA (arXiv:2410.07170), by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftConfig, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from artifacts.errors import FieldError, RequestInvalid
from train.methods.lora import LoraFamily
from train.methods.peft_adapter import ADAPTER, adapter_tensors, config_document, write_adapter
from train.options.baselines import EvaOptions
from train.protocol import MethodContext
from train.tasks.rows import IGNORED

LAYERS = "eva_layers.json"
_DECIDED = ("target_modules", "rank_pattern", "alpha_pattern")


class Eva(LoraFamily[EvaOptions]):
    """The ranks of all layers are dealt out by the variance that their inputs have along each direction."""

    def fields(self) -> dict[str, Any]:
        return {
            "init_lora_weights": "eva",
            "eva_config": EvaConfig(rho=self.options.rho, tau=self.options.tau),
        }

    def config(self, context: MethodContext) -> LoraConfig:
        if context.checkpoint is None:
            return super().config(context)
        # Measured before the interruption: the same ranks, whose factors the checkpoint brings.
        decided = json.loads((context.checkpoint / LAYERS).read_text(encoding="utf-8"))
        options = self.options
        return LoraConfig(
            task_type=context.task_type,
            r=options.rank,
            lora_alpha=options.numerator,
            lora_dropout=options.dropout,
            modules_to_save=list(context.whole) or None,
            **decided,
        )

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        if context.checkpoint is None:
            self._check_samples(model, context)
        prepared = super().prepare(model, context)
        if context.checkpoint is None:
            with _contiguous_inputs(prepared):
                initialize_lora_eva_weights(
                    prepared,
                    _Batches(context),
                    forward_fn=context.loss,
                    prepare_model_inputs_fn=_counted,
                    prepare_layer_inputs_fn=_samples,
                    show_progress_bar=False,
                )
        return prepared

    def _check_samples(self, model: nn.Module, context: MethodContext) -> None:
        """PEFT looks for a batch with at least as many inputs as directions; without one it would look for ever."""
        wanted = round(self.options.rank * self.options.rho)
        largest = max(context.batches(), key=_sample_count)
        if (found := _sample_count(largest)) < wanted:
            self._refuse(f"no batch has {wanted} tokens that the loss counts (rank × rho); the largest has {found}")
        counts = _layer_counts(model, context, largest)
        for path, found in counts.items():
            if found < wanted:
                self._refuse(f"{path} gets {found} inputs from a batch; {wanted} (rank × rho) are needed")

    @staticmethod
    def _refuse(problem: str) -> None:
        raise RequestInvalid(
            f"EVA: {problem}.",
            hint="Take larger batches, longer rows, or a smaller rank, or leave the layer out of target_modules.",
            errors=[FieldError("/training/batch_size", problem)],
        )

    def wrap(self, model: nn.Module, config: PeftConfig, *, empty: bool = False) -> nn.Module:
        return super().wrap(model, config, empty=empty or getattr(config, "init_lora_weights", None) == "eva")

    def save(self, model: nn.Module, directory: Path) -> None:
        super().save(model, directory)
        document = config_document(model.peft_config[ADAPTER])  # type: ignore[index]
        decided = {name: document[name] for name in _DECIDED}
        (directory / LAYERS).write_text(json.dumps(decided), encoding="utf-8")

    def export(self, model: nn.Module, directory: Path) -> None:
        """A plain LoRA: how A began is of no use to whoever loads it."""
        config: LoraConfig = model.peft_config[ADAPTER]  # type: ignore[index]
        plain = LoraConfig(
            task_type=config.task_type,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            modules_to_save=config.modules_to_save,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            base_model_name_or_path=config.base_model_name_or_path,
            fan_in_fan_out=config.fan_in_fan_out,
        )
        write_adapter(directory, adapter_tensors(model), plain)


class _Batches:
    """The training batches, as often as PEFT goes through them."""

    def __init__(self, context: MethodContext) -> None:
        self._context = context

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return self._context.batches()

    def __len__(self) -> int:
        return sum(1 for _ in self._context.batches())


def _counted(batch: Mapping[str, Tensor], config: PeftConfig | None = None) -> Tensor | None:
    """(tokens, 2) places of the tokens that the loss counts: all, if it counts rows; None of what has no tokens."""
    del config
    ids = batch.get("input_ids")
    if ids is None:
        return None
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    labels = batch.get("labels")
    if labels is not None and labels.shape == ids.shape:
        mask = mask & (labels != IGNORED)
    return mask.nonzero()


def _samples(inputs: Any, places: Tensor | None, layer: str) -> Tensor:
    """(samples, d_in): what a layer gets at these places; all of it, if it is not called for every token."""
    del layer
    given: Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
    if places is None or given.dim() < 3:
        return given.reshape(-1, given.shape[-1])
    return given[places.T.unbind()]


def _sample_count(batch: Mapping[str, Tensor]) -> int:
    """Tokens that the loss counts, or rows where there are none."""
    places = _counted(batch)
    return len(next(iter(batch.values()))) if places is None else len(places)


@torch.no_grad()
def _layer_counts(model: nn.Module, context: MethodContext, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """How many inputs each layer gets from the batch."""
    places = _counted(batch)
    found: dict[str, int] = {}

    def count(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, inputs: Any) -> None:
            del layer
            found[path] = len(_samples(inputs, places, path))

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(count(path)) for path in context.targets]
    try:
        context.loss(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return found


@contextmanager
def _contiguous_inputs(model: nn.Module) -> Iterator[None]:
    """PEFT reads the inputs of the layers as flat memory, which slices are not: a pooler's first token, say."""

    def contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)

    hooks = [
        module.register_forward_pre_hook(contiguous) for module in model.modules() if isinstance(module, LoraLayer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
