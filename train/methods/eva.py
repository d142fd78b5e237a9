"""EVA (arXiv:2410.07170), by PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import EvaConfig, LoraConfig, PeftConfig, initialize_lora_eva_weights
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
            **decided,
        )

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        if context.checkpoint is None:
            self._check_tokens(context)
        prepared = super().prepare(model, context)
        if context.checkpoint is None:
            initialize_lora_eva_weights(prepared, _Batches(context), show_progress_bar=False)
        return prepared

    def _check_tokens(self, context: MethodContext) -> None:
        """PEFT looks for a batch with at least as many tokens as directions; without one it would look for ever."""
        wanted = round(self.options.rank * self.options.rho)
        largest = max(int((batch["labels"] != IGNORED).sum()) for batch in context.batches())
        if largest < wanted:
            problem = f"no batch has {wanted} tokens that the loss counts (rank × rho); the largest has {largest}"
            raise RequestInvalid(
                f"EVA: {problem}.",
                hint="Take larger batches, longer rows, or a smaller rank.",
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
