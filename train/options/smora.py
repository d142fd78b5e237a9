"""Options of SMoRA. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from artifacts.errors import FieldError
from artifacts.menu import Number
from train.options.common import Alpha, Circumstances, Dropout, Rank, TrainOptions


class SmoraOptions(TrainOptions):
    """SMoRA, arXiv:2501.15103: a router switches on a few of the r components of one LoRA, for every token anew."""

    rank: Rank = Field(64, description="r: all components of a layer (the authors' code: 64).")
    active_rank: Rank = Field(
        8,
        description="k: components that are switched on for a token (activate_r in the authors' code: 8); at most the "
        "rank and the smaller side of every adapted weight, a multiple of rank_partition.",
    )
    alpha: Alpha | None = Field(
        None,
        description="Numerator of the scaling, which is alpha/k and not alpha/r; unset, it is chosen so that the "
        "scaling is 2 (the authors' code: 16 with k = 8).",
    )
    rank_partition: Rank = Field(
        1,
        description="p: components that are switched together. 1 is the method; larger ones, which have to divide the "
        "rank, make a mixture of experts of rank p out of it.",
    )
    bias_update_rate: Annotated[Number, Field(ge=0, le=1)] = Field(
        1e-3,
        description="u: how far the balance bias of a component moves in an optimiser step, up if fewer tokens than "
        "the mean chose it, down if more did; 0 balances nothing. The authors' code has 1e-5 in every forward pass, "
        "which hardly balances.",
    )
    bias_in_gate: StrictBool = Field(
        False,
        description="Let the balance bias change the gates too, as the authors' code does, and not the choice alone.",
    )
    fold: Literal["none", "per_task"] = Field(
        "none",
        description="per_task: beside its own, the training gives one plain LoRA for each value of "
        "evaluation.group_column, in which every component has the mean gate of that task's tokens: lossy, with the "
        "loss measured.",
    )
    dropout: Dropout = Field(0.0, description="Share of the inputs that router and lora_A do not see in a step.")

    @property
    def gives_beside(self) -> bool:
        return self.fold == "per_task"

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * (d_out + d_in) + self.rank // self.rank_partition * d_in

    @property
    def numerator(self) -> float:
        """The alpha in force."""
        return self.alpha if self.alpha is not None else 2.0 * self.active_rank

    def decided_by(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the layers are made of; the rate of the bias may be another one."""
        names = {name: name for name in ("active_rank", "rank_partition", "bias_in_gate")} | {"lora_alpha": "alpha"}
        # What is missing must not become a default: no option takes a text.
        return {option: "nothing" if config.get(name) is None else config[name] for name, option in names.items()}

    def problems(self, known: Circumstances) -> list[FieldError]:
        found = []
        if self.active_rank > self.rank:
            found.append(
                FieldError("/parameters/active_rank", f"{self.active_rank} are more than the rank, {self.rank}")
            )
        for name, value in (("rank", self.rank), ("active_rank", self.active_rank)):
            if value % self.rank_partition:
                found.append(
                    FieldError(
                        f"/parameters/{'rank_partition' if name == 'rank' else name}",
                        f"the {name} of {value} is no multiple of rank_partition, {self.rank_partition}: an expert "
                        "would be split",
                    )
                )
        if self.fold == "per_task" and (known.packed or not known.grouped):
            needed = (
                "task.packing mixes the tasks of a pack"
                if known.packed
                else "evaluation.group_column has to name the tasks, and evaluation.validation_fraction has to hold "
                "rows out, on which the loss is measured"
            )
            found.append(FieldError("/parameters/fold", f"per_task can not be done: {needed}"))
        if known.targets:
            smallest = min(known.targets, key=lambda target: min(target.d_out, target.d_in))
            limit = min(smallest.d_out, smallest.d_in)
            if self.active_rank > limit:
                sides = f"{smallest.d_out}×{smallest.d_in}"
                found.append(
                    FieldError(
                        "/parameters/active_rank",
                        f"{self.active_rank} is above {limit}, the smaller side of {smallest.path} ({sides})",
                    )
                )
        return found

    def warnings(self, known: Circumstances) -> list[str]:
        found = []
        if self.active_rank == self.rank_partition and self.active_rank < self.rank:
            found.append(
                "With one expert for a token its gate is always the same, so that no gradient reaches the router: it "
                "stays as it was drawn, and only the balance bias moves the choice."
            )
        if self.bias_in_gate:
            found.append(
                "With bias_in_gate a bias that has grown can turn a gate negative, or let the sum of the gates come "
                "near 0."
            )
        return found
