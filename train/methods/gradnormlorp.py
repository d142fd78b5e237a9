"""GradNormLoRP (arXiv:2412.19616): weight-normalised layers, trained by AdamW on projected gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from artifacts.errors import FieldError, FileBroken, RequestInvalid
from train.adapted_layers import AdaptedLinear, LowRank
from train.continuation import Start
from train.methods.own_adapter import PREFIX, OwnMethod, write_plain_lora
from train.normalized_layers import LowRankNormalizedLinear, NormalizedLinear, WholeNormalizedLinear
from train.options.common import ADAM_STATE_BYTES
from train.options.gradnormlorp import GradnormlorpOptions
from train.projected_adamw import ProjectedAdamW, state_bytes
from train.protocol import MethodContext, TrainMethod
from train.stored_factors import MAGNITUDE, peft_tensors

if TYPE_CHECKING:
    from train.settings import TrainingSettings

NAMED = 20
_NOISE = 1e-6  # of the largest singular value: what float32 leaves where nothing was learnt


def make(options: GradnormlorpOptions) -> TrainMethod[GradnormlorpOptions]:
    """The implementation of the mode."""
    return FullGradnormlorp(options) if options.full else Gradnormlorp(options)


class _NormalizedMethod(OwnMethod[GradnormlorpOptions]):
    """What both modes share: the optimiser, what is told of it, and the export as a DoRA adapter."""

    def __init__(self, options: GradnormlorpOptions) -> None:
        super().__init__(options)
        self._optimizer: ProjectedAdamW | None = None
        self._told: dict[str, Any] = {}

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        prepared = super().prepare(model, context)
        empty = [path for path, layer in self.normalized.items() if layer.empty_rows()]
        if empty:
            problems = [
                FieldError("/parameters/target_modules", f"{path} has rows of zeros, which have no direction")
                for path in empty[:NAMED]
            ]
            raise RequestInvalid(
                f"{len(empty)} of the layers can not be normalised: {problems[0].message}.",
                hint="Leave these layers out of target_modules.",
                errors=problems,
            )
        return prepared

    @property
    def normalized(self) -> dict[str, NormalizedLinear]:
        return {path: layer for path, layer in self.layers.items() if isinstance(layer, NormalizedLinear)}

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> ProjectedAdamW:
        """A, B or W by projected gradients; the norms, and what is trained whole, by AdamW. Vectors do not decay."""
        projected = list(self._projected().values())
        plain = [layer.magnitude for layer in self.normalized.values()]
        plain += [value for path in self.context.whole for value in model.get_submodule(path).parameters()]
        groups: list[dict[str, Any]] = [
            {"params": projected, "projected": True},
            {"params": [value for value in plain if value.ndim > 1]},
            {"params": [value for value in plain if value.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = ProjectedAdamW(
            [group for group in groups if group["params"]],
            self.options.projection,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        if self.options.update_in_backward:
            self._optimizer.update_in_backward()
        return self._optimizer

    def metrics(self) -> dict[str, float]:
        """How many parameters got a new space in the step; the norm of its gradients, where the loop can not see it."""
        if self._optimizer is None:
            return {}
        norm = {"gradient_norm": self._optimizer.gradient_norm} if self.options.update_in_backward else {}
        return {"new_spaces": float(self._optimizer.refreshed), **norm}

    def state(self) -> dict[str, Any]:
        return {"optimizer": self._measured()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._told = dict(state["optimizer"])

    def report(self, model: nn.Module) -> dict[str, Any]:
        """What the optimiser kept at the end, in bytes, beside AdamW's; which moments were in 8 bits."""
        del model
        return {"optimizer": self._measured()}

    def export(self, model: nn.Module, directory: Path) -> None:
        """A DoRA adapter as PEFT writes it; nothing of the optimiser is in it."""
        found = {path: self.factors(path, layer) for path, layer in self.layers.items()}
        config = self.plain_config(found)
        config.use_dora = True
        norms = {f"{path}.{MAGNITUDE}": layer.magnitude for path, layer in self.normalized.items()}
        write_plain_lora(directory, found, self.whole_tensors(model) | norms, config)

    def _projected(self) -> dict[str, nn.Parameter]:
        """Name → parameter of all that is trained by projected gradients."""
        return {
            f"{path}.{name}": value
            for path, layer in self.layers.items()
            for name, value in layer.own_tensors()
            if isinstance(value, nn.Parameter) and value.ndim == 2
        }

    def _measured(self) -> dict[str, Any]:
        optimizer = self._optimizer
        if optimizer is None:  # the training had ended when this process took it over
            return self._told
        projected = self._projected()
        states = {name: optimizer.state.get(parameter, {}) for name, parameter in projected.items()}
        numbers = sum(value.numel() for group in optimizer.param_groups for value in group["params"])
        return {
            "bytes": state_bytes(optimizer),
            "adamw_bytes": ADAM_STATE_BYTES * numbers,
            "projected": len(projected),
            "proj_rank": optimizer.projection.rank,
            "spaces": max((self.options.windows(state.get("count", 0)) for state in states.values()), default=0),
            "in_8_bits": sorted(name for name, state in states.items() if "first_codes" in state),
            "never_moved": sorted(name for name, state in states.items() if "count" not in state)[:NAMED],
        }


class Gradnormlorp(_NormalizedMethod):
    """y = diag(m/‖V‖)·V·x with V = W + scaling·B·A, the form of DoRA; m, A and B are trained."""

    def layer(self, path: str, base: nn.Module) -> LowRankNormalizedLinear:
        options = self.options
        scaling = options.numerator / options.rank
        exact = options.norm_grad == "exact"
        return LowRankNormalizedLinear(base, options.rank, scaling, options.dropout, exact=exact)

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """Of V − W."""
        assert isinstance(layer, LowRankNormalizedLinear)
        return LowRank(layer.lora_A, layer.lora_B, layer.scaling)

    def plain_config(self, found: Mapping[str, LowRank]) -> LoraConfig:
        config = super().plain_config(found)
        alpha = self.options.numerator  # as it was given, not as it comes out of scaling × rank
        config.lora_alpha = int(alpha) if alpha == int(alpha) else alpha
        config.alpha_pattern = {}
        return config

    @torch.no_grad()
    def _go_on(self, model: nn.Module, start: Start) -> None:
        places: dict[str, Tensor] = {f"{PREFIX}{name}": value for name, value in self.whole_tensors(model).items()}
        for path, layer in self.layers.items():
            assert isinstance(layer, LowRankNormalizedLinear)
            places |= {
                f"{PREFIX}{path}.lora_A.weight": layer.lora_A,
                f"{PREFIX}{path}.lora_B.weight": layer.lora_B,
                f"{PREFIX}{path}.{MAGNITUDE}": layer.magnitude,
            }
        stored = peft_tensors(start)
        odd = stored.keys() ^ places.keys()
        odd |= {name for name in stored.keys() & places.keys() if stored[name].shape != places[name].shape}
        if odd:
            raise FileBroken(f"The adapter to go on from does not fit this training: {', '.join(sorted(odd)[:5])}.")
        for name, place in places.items():
            place.copy_(stored[name])


class FullGradnormlorp(_NormalizedMethod):
    """y = diag(m/‖V‖)·V·x with the whole of V trained; V − W has at most the rank of all spaces that were used."""

    def __init__(self, options: GradnormlorpOptions) -> None:
        super().__init__(options)
        self._found: dict[str, LowRank] = {}
        self._lost: dict[str, float] = {}

    def layer(self, path: str, base: nn.Module) -> WholeNormalizedLinear:
        return WholeNormalizedLinear(base)

    def settle(self, model: nn.Module) -> None:
        """Decompose what was learnt; the layers stay as they were trained."""
        del model
        for path, layer in self.normalized.items():
            assert isinstance(layer, WholeNormalizedLinear)
            self._found[path], self._lost[path] = self.decompose(layer)

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        """Of V − W, as it was when the training ended."""
        return self._found[path]

    @torch.no_grad()
    def decompose(self, layer: WholeNormalizedLinear) -> tuple[LowRank, float]:
        """V − W by all directions of the spaces that rounding has not made up, in float64, and the share of ‖V − W‖
        that is left out: rounding."""
        U, S, Vh = torch.linalg.svd(layer.change.detach().to("cpu", torch.float64), full_matrices=False)
        learnt = int(torch.count_nonzero(S.gt(_NOISE * S[0])))
        most = min(self.options.windows(self.context.total_steps) * self.options.projection.rank, len(S))
        rank = max(1, min(most, learnt))
        root = S[:rank].sqrt()
        lost = float(S[rank:].norm() / S.norm()) if float(S[0]) else 0.0
        A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
        return LowRank(A.to(torch.float32), B.to(torch.float32), 1.0), lost

    def report(self, model: nn.Module) -> dict[str, Any]:
        """Also the ranks of V − W, and the largest share of a layer's that is rounding and is left out."""
        ranks = {path: found.rank for path, found in self._found.items()}
        return super().report(model) | {"ranks": ranks, "left_out": max(self._lost.values(), default=0.0)}
