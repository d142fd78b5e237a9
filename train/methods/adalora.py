"""AdaLoRA (arXiv:2303.10512), by PEFT; exported as the plain LoRA that it is in the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora import SVDLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.methods.peft_adapter import ADAPTER, WEIGHTS, PeftMethod, to_file, write_adapter
from train.options.baselines import AdaloraOptions
from train.protocol import MethodContext

IMPORTANCE = "importance.safetensors"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_LAYER_PREFIX = "base_model.model."
_WHOLE = f".modules_to_save.{ADAPTER}"  # in the name of a parameter that is trained as it is


class Adalora(PeftMethod[AdaloraOptions]):
    """The importance of every entry is measured in each step, and the budget of ranks falls along a cubic."""

    def config(self, context: MethodContext) -> AdaLoraConfig:
        options, total = self.options, context.total_steps
        first, last = int(options.warmup * total), int(options.final * total)
        return AdaLoraConfig(
            task_type=context.task_type,
            init_r=options.initial_rank,
            target_r=options.target_rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=list(context.targets),
            modules_to_save=list(context.whole) or None,
            tinit=first,
            tfinal=last,
            deltaT=options.interval,
            orth_reg_weight=0.0,  # PEFT adds it once for each forward pass and rank; `extra_loss` once for each step
            total_step=total,
        )

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self._prepared = super().prepare(model, context)
        return self._prepared

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """The mean over all A and B of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (eq. 4 without squares, as PEFT has it), weighted."""
        if not self.options.orthogonality:
            return None
        distances = []
        for name, factor in _factors(model):
            if ".lora_E" not in name:
                gram = factor @ factor.T if ".lora_A" in name else factor.T @ factor
                distances.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.options.orthogonality * torch.stack(distances).mean()

    def after_update(self, model: nn.Module, step: int) -> None:
        model.base_model.update_and_allocate(step)  # type: ignore[union-attr,operator]

    def metrics(self) -> dict[str, float]:
        ranks = [int((layer.lora_E[ADAPTER] != 0).sum()) for _, layer in _layers(self._prepared)]
        return {"mean_rank": sum(ranks) / len(ranks)}

    def save(self, model: nn.Module, directory: Path) -> None:
        save_file({name: to_file(value) for name, value in _trained(model)}, directory / WEIGHTS)
        allocator = model.base_model.rankallocator  # type: ignore[union-attr]
        averages = {
            f"{kind}/{name}": value.cpu().contiguous()
            for kind in _AVERAGES
            for name, value in getattr(allocator, kind).items()
        }
        save_file(averages, directory / IMPORTANCE)

    def load(self, model: nn.Module, directory: Path) -> None:
        saved = load_file(directory / WEIGHTS)
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(saved[name])
        allocator = model.base_model.rankallocator  # type: ignore[union-attr]
        device = next(model.parameters()).device
        for key, value in load_file(directory / IMPORTANCE).items():
            kind, _, name = key.partition("/")
            getattr(allocator, kind)[name] = value.to(device)

    def state(self) -> dict[str, Any]:
        return {"rank_pattern": self._prepared.peft_config[ADAPTER].rank_pattern}  # type: ignore[index,union-attr]

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._prepared.peft_config[ADAPTER].rank_pattern = state["rank_pattern"]  # type: ignore[index,union-attr]

    def export(self, model: nn.Module, directory: Path) -> None:
        """ΔW = s/(n + 1e-5)·B·diag(E)·A: the entries of E that are not 0, with all factors but A folded into B."""
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for path, layer in _layers(model):
            e = layer.lora_E[ADAPTER].detach().flatten()
            kept = torch.nonzero(e).flatten()
            if len(kept) == 0:
                continue
            scale = e[kept] * layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)
            ranks[path] = len(kept)
            a, b = layer.lora_A[ADAPTER].detach()[kept], layer.lora_B[ADAPTER].detach()[:, kept] * scale
            tensors[f"{_LAYER_PREFIX}{path}.lora_A.weight"] = a.cpu().contiguous()
            tensors[f"{_LAYER_PREFIX}{path}.lora_B.weight"] = b.cpu().contiguous()
        config: AdaLoraConfig = model.peft_config[ADAPTER]  # type: ignore[index]
        largest = max(ranks.values())
        smaller = {path: rank for path, rank in sorted(ranks.items()) if rank != largest}
        plain = LoraConfig(
            task_type=config.task_type,
            r=largest,
            lora_alpha=largest,
            rank_pattern=smaller,
            alpha_pattern=dict(smaller),
            target_modules=sorted(ranks),
            base_model_name_or_path=config.base_model_name_or_path,
            modules_to_save=config.modules_to_save,
            fan_in_fan_out=config.fan_in_fan_out,
        )
        tensors |= {name.replace(_WHOLE, ""): to_file(value) for name, value in _trained(model) if _WHOLE in name}
        write_adapter(directory, tensors, plain)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(path in the base model, layer) of every adapted layer."""
    return [
        (name.removeprefix(_LAYER_PREFIX), module)
        for name, module in model.named_modules()
        if isinstance(module, SVDLinear)
    ]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The factors, and what is trained whole."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name or _WHOLE in name]


def _factors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name]
