"""Bone (arXiv:2409.15371), later DiSHA and MiSS: the layers of PEFT's MiSS, and one of our own for bat_row.

"Bone" named two algorithms: since version 4 of the paper the tile form, which PEFT calls the default of MiSS, before
that what PEFT calls "bat". The option `variant` says which is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import MissConfig
from peft.tuners.miss.layer import MissLayer
from torch import Tensor, nn

from artifacts.errors import FieldError, RequestInvalid
from artifacts.shard_blocks import lora_factors
from train import declared
from train.adapted_layers import AdaptedLinear, LowRank, LowRankLinear, exchange
from train.bat_row import BatRowLinear
from train.methods.own_adapter import PREFIX, OwnMethod, plain_config, write_plain_lora
from train.methods.peft_adapter import ADAPTER, PeftMethod, adapter_tensors
from train.options.bone import INIT_WEIGHTS, BoneOptions
from train.protocol import MethodContext, TrainMethod
from train.truncation import Truncation, truncate

BAT_ROW = "RANKWISE_BAT_ROW"
_BLOCK = ".miss_block"


def make(options: BoneOptions) -> TrainMethod[BoneOptions]:
    """The implementation of the variant."""
    return BatRow(options) if options.variant == "bat_row" else Bone(options)


class Bone(PeftMethod[BoneOptions]):
    """The variants that PEFT has. default and mini end as a plain LoRA that is the same function exactly."""

    cut: Truncation | None = None

    def config(self, context: MethodContext) -> MissConfig:
        return MissConfig(
            task_type=context.task_type,
            r=self.options.rank,
            mini_r=self.options.mini_r if self.options.variant == "mini" else 1,
            miss_dropout=self.options.dropout,
            init_weights=INIT_WEIGHTS[self.options.variant],
            target_modules=list(context.targets),
            modules_to_save=list(context.whole) or None,
        )

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        require_linear(model, context.targets)
        self.context = context
        return super().prepare(model, context)

    def settle(self, model: nn.Module) -> None:
        if self.options.lossy_rank is None:
            return
        base, layers = _base(model), dict(self._layers(model))
        self.whole = self._whole(model)
        self.cut = truncate(((path, _delta(layer)) for path, layer in layers.items()), self.options.lossy_rank)
        for path, layer in layers.items():
            exchange(base, path, LowRankLinear(layer.get_base_layer(), self.cut.factors[path]))

    def report(self, model: nn.Module) -> dict[str, Any]:
        if self.cut is not None:
            return {"variant": self.options.variant, "export": self.cut.to_dict()}
        if self.options.guided:
            export = {
                "form": "miss",
                "exact": True,
                "rank": self.options.rank,
                "loads_with": "PEFT; init_weights, which says that it is bat, must stay in its configuration",
                "valid_on": "the weights of the base model that it was trained on, which ΔW depends on",
            }
        else:
            rank = max(min(layer.miss_block[ADAPTER].shape) for _, layer in self._layers(model))
            export = {"form": "lora", "exact": True, "rank": rank, "loads_with": "PEFT and whatever else loads a LoRA"}
        return {"variant": self.options.variant, "export": export}

    def export(self, model: nn.Module, directory: Path) -> None:
        if self.options.guided and self.cut is None:
            super().export(model, directory)
            return
        config: MissConfig = model.peft_config[ADAPTER]  # type: ignore[index]
        if self.cut is not None:
            found, whole = self.cut.factors, self.whole
        else:
            found, whole = {path: _plain(layer) for path, layer in self._layers(model)}, self._whole(model)
        plain = plain_config(
            found,
            base_name=config.base_model_name_or_path or "",
            task_type=self.context.task_type,
            whole=self.context.whole,
        )
        write_plain_lora(directory, found, whole, plain)

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, MissLayer]]:
        base = _base(model)
        for path in self.context.targets:
            layer = base.get_submodule(path)
            assert isinstance(layer, MissLayer)
            yield path, layer

    def _whole(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = adapter_tensors(model)
        return {name.removeprefix(PREFIX): value for name, value in tensors.items() if not name.endswith(_BLOCK)}


class BatRow(OwnMethod[BoneOptions]):
    """The variant that PEFT lacks. It ends as an adapter of a type of our own, or as a LoRA that loses something."""

    cut: Truncation | None = None

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        require_linear(model, context.targets)
        return super().prepare(model, context)

    def layer(self, path: str, base: nn.Module) -> AdaptedLinear:
        return BatRowLinear(base, self.options.rank)

    def settle(self, model: nn.Module) -> None:
        if self.options.lossy_rank is None:
            return
        self.cut = truncate(((path, layer.delta()) for path, layer in self.layers.items()), self.options.lossy_rank)
        for path, layer in self.layers.items():
            exchange(model, path, LowRankLinear(layer.base, self.cut.factors[path]))

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """What is left of ΔW at `lossy_rank`; an adapter that loses nothing has no factors."""
        assert self.cut is not None
        return self.cut.factors[path]

    def report(self, model: nn.Module) -> dict[str, Any]:
        export = {
            "form": "bat_row",
            "exact": True,
            "rank": self.options.rank,
            "loads_with": f"{declared.LOADER} of Rankwise; PEFT does not know this type",
            "valid_on": "the weights of the base model that it was trained on, which ΔW depends on",
        }
        return {"variant": self.options.variant, "export": export if self.cut is None else self.cut.to_dict()}

    def export(self, model: nn.Module, directory: Path) -> None:
        if self.cut is not None:
            super().export(model, directory)
            return
        config = {
            "r": self.options.rank,
            "base_model_name_or_path": self.base_name,
            "task_type": self.context.task_type,
            "modules_to_save": list(self.context.whole) or None,
        }
        declared.write(directory, BAT_ROW, self.layers, self.whole_tensors(model), config)

    def reload(self, base: nn.Module, directory: Path) -> nn.Module:
        return super().reload(base, directory) if self.cut is not None else declared.load(base, directory)


def require_linear(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse layers that keep their weights in another way than `nn.Linear`.

    Raises:
        RequestInvalid: naming each of them.
    """
    kinds = {path: type(model.get_submodule(path)) for path in targets}
    faults = [
        FieldError("/parameters/target_modules", f"{path} is a {kind.__name__}; Bone adapts nn.Linear only")
        for path, kind in kinds.items()
        if not issubclass(kind, nn.Linear)
    ]
    if faults:
        raise RequestInvalid(f"{faults[0].message}.", hint="Leave it out of target_modules.", errors=faults)


def _base(model: nn.Module) -> nn.Module:
    """The base model inside PEFT's."""
    found = model.base_model.model  # type: ignore[union-attr]
    assert isinstance(found, nn.Module)
    return found


def _plain(layer: MissLayer) -> LowRank:
    """ΔW of the variants default and mini."""
    block = layer.miss_block[ADAPTER].detach()
    return LowRank(*lora_factors(block, layer.out_features, layer.in_features), scaling=1.0)


@torch.no_grad()
def _delta(layer: MissLayer) -> Tensor:
    """ΔW of the variant bat, (d_out, d_in) float32."""
    found: Tensor = layer.get_delta_weight(ADAPTER, layer.get_base_layer().weight)
    return found
