"""Options of GradNormLoRP. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from artifacts.errors import FieldError
from artifacts.menu import Number
from train.options.common import ADAM_STATE_BYTES, Circumstances, LowRankOptions, Rank, Target
from train.projection import Bits, OnRefresh, Projection, Sides

SHORT_INTERVAL = 20
_OF_THE_ADAPTER = {
    "rank": "the rank of the result follows from proj_rank and the steps",
    "alpha": "there are no factors to scale",
    "dropout": "there is no branch of low rank whose inputs could be dropped",
    "norm_grad": "whole weights are trained with the exact gradient",
}


class GradnormlorpOptions(LowRankOptions):
    """GradNormLoRP, arXiv:2412.19616: DoRA whose factors are trained by AdamW on projected gradients.

    Its sources give settings that go together: scale 4 with learning rate 3e-5 and a projection of rank 4 or 8, renewed
    every 500 steps (fine-tuning), scale 0.25 with 1e-2 (pre-training).
    """

    mode: Literal["adapter", "full"] = Field(
        "adapter",
        description="adapter trains m, A and B. full, experimental, trains the whole of every adapted weight by "
        "projected gradients, for the memory of its gradient; what was learnt has a low rank and comes out as a DoRA "
        "adapter.",
    )
    proj_rank: Rank | None = Field(
        None,
        description="R, the rank of the space that the gradients are projected into; not the rank of the adapter. "
        "Unset in mode adapter: half of rank, as the authors' 4 of 8; in mode full it must be given (the authors: 128 "
        "to 1024). Only below rank does it save memory in mode adapter.",
    )
    update_proj_gap: Annotated[StrictInt, Field(ge=1, le=10_000_000)] = Field(
        200, description="T, steps between two choices of that space (the authors: 200 to 500)."
    )
    scale: Annotated[Number, Field(gt=0, le=1000)] = Field(
        1.0,
        description="Factor of the projected updates: scale times training.learning_rate is the learning rate of A and "
        "B, training.learning_rate that of m.",
    )
    proj_type: Sides = Field(
        "std",
        description="Which side of a gradient is projected: the shorter one, the longer one, always the columns, "
        "always the rows, or both (the paper's formula; its code runs std).",
    )
    optim_bits: Bits = Field(
        32,
        description="8 keeps moments in 8 bits, in blocks of 256; those with less than 4096 numbers stay in 32 bits.",
    )
    norm_grad: Literal["detach", "exact"] = Field(
        "detach",
        description="Whether the norms of the rows are constants in a step, as in DoRA and in the authors' code, or "
        "differentiated, as the paper argues.",
    )
    on_refresh: OnRefresh = Field(
        "keep",
        description="What becomes of Adam's moments in a new space: keep their numbers, as the authors' code does, "
        "rotate the first one into it, or begin again at 0.",
    )
    defer_first_svd: StrictBool = Field(
        True,
        description="A parameter's first space waits for a gradient that is not 0. With false, as in the authors' "
        "code, only proj_rank rows of A move before the second space.",
    )

    update_in_backward: StrictBool = Field(
        False,
        description="Update every parameter within the backward pass, as soon as its gradient is there, and free that "
        "gradient: the memory of one and not of all, which is much in mode full. Needs max_grad_norm 0, "
        "gradient_accumulation 1, one device and no float16.",
    )

    @property
    def frees_gradients(self) -> bool:
        return self.update_in_backward

    @property
    def full(self) -> bool:
        return self.mode == "full"

    @property
    def largest_rank(self) -> int | None:
        return None if self.full else self.rank

    @property
    def projection(self) -> Projection:
        """In mode full `proj_rank` must have been checked by `problems`."""
        return Projection(
            rank=self.proj_rank if self.proj_rank is not None else max(1, self.rank // 2),
            interval=self.update_proj_gap,
            scale=self.scale,
            sides=self.proj_type,
            bits=self.optim_bits,
            on_refresh=self.on_refresh,
            deferred=self.defer_first_svd,
        )

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return sum(rows * columns for rows, columns in self._projected(d_out, d_in)) + d_out

    def optimizer_bytes_of(self, d_out: int, d_in: int) -> int:
        projection = self.projection
        bytes_ = sum(projection.state_bytes(*sides) for sides in self._projected(d_out, d_in))
        return bytes_ + ADAM_STATE_BYTES * d_out

    def windows(self, steps: int) -> int:
        """How many spaces a training of so many steps has."""
        return -(-steps // self.update_proj_gap)

    def problems(self, known: Circumstances) -> list[FieldError]:
        found = super().problems(known)
        if known.training.optimizer != "adamw":
            found.append(FieldError("/training/optimizer", "GradNormLoRP projects what AdamW keeps; take adamw"))
        if self.full:
            found += self._problems_of_full(known)
        if self.update_in_backward:
            found += _problems_of_one_pass(known)
        smallest = min(known.targets, key=_smaller_side, default=None)
        if smallest is None or (self.full and self.proj_rank is None):
            return found
        rank, side = self.projection.rank, _smaller_side(smallest)
        if rank > side:
            told = f"proj_rank {rank} is above {side}, the smaller side of {smallest.path}"
            found.append(FieldError("/parameters/proj_rank", f"{told} ({smallest.d_out}×{smallest.d_in})"))
        limit = side if self.full else self.rank
        if self.proj_type == "reverse_std" and rank >= limit:
            told = f"reverse_std needs a proj_rank below {limit}: it has {rank}, with which nothing is projected"
            found.append(FieldError("/parameters/proj_type", told))
        return found

    def warnings(self, known: Circumstances) -> list[str]:
        return [*super().warnings(known), *self._of_memory(known), *self._of_time(known)]

    def _problems_of_full(self, known: Circumstances) -> Iterator[FieldError]:
        if self.proj_rank is None:
            yield FieldError("/parameters/proj_rank", "mode full needs it: the authors take 128 to 1024")
        for name, reason in _OF_THE_ADAPTER.items():
            if name in self.model_fields_set and (name, getattr(self, name)) != ("norm_grad", "exact"):
                yield FieldError(f"/parameters/{name}", f"{name} belongs to mode adapter; in mode full {reason}")
        if known.training.weight_decay:
            told = "weight decay changes a whole weight by a full rank, and no DoRA adapter could hold it; leave it out"
            yield FieldError("/training/weight_decay", told)

    def _of_memory(self, known: Circumstances) -> Iterator[str]:
        projection = self.projection
        sides = [(target.d_out, target.d_in) for target in known.targets]
        own = sum(self.optimizer_bytes_of(*shape) for shape in sides)
        plain = sum(ADAM_STATE_BYTES * self.parameters_of(*shape) for shape in sides)
        told = f"the optimiser keeps {own:,} bytes, AdamW would keep {plain:,}" if sides else ""
        lossless = not self.full and projection.rank >= self.rank
        if lossless:
            yield (
                f"The projection is lossless and saves nothing: proj_rank {projection.rank} is not below rank "
                f"{self.rank}, so that only the axes of Adam are turned{'; ' + told if told else ''}."
            )
        elif own >= plain and sides:
            yield f"The projection saves no memory: {told}."
        if self.optim_bits == 8 and not any(
            projection.in_8_bits(*shape) for layer in sides for shape in self._projected(*layer)
        ):
            yield "optim_bits 8 has no effect: no moment has the 4096 numbers from which 8 bits are taken."

    def _of_time(self, known: Circumstances) -> Iterator[str]:
        steps = known.steps
        renewed = steps is None or steps > self.update_proj_gap
        if self.update_proj_gap < SHORT_INTERVAL and self.on_refresh == "keep" and renewed:
            yield (
                f"With a new space every {self.update_proj_gap} steps the moments that are kept mean little: take at "
                f"least {SHORT_INTERVAL}, or on_refresh rotate or reset."
            )
        if self.full and steps is not None:
            rank = self.windows(steps) * self.projection.rank
            large = [
                target
                for target in known.targets
                if min(rank, _smaller_side(target)) * (target.d_out + target.d_in) >= target.d_out * target.d_in
            ]
            if large:
                yield (
                    f"In {steps} steps {self.windows(steps)} spaces of rank {self.projection.rank} are used: for "
                    f"{len(large)} of {len(known.targets)} layers the adapter can become as large as the weights."
                )

    def _projected(self, d_out: int, d_in: int) -> list[tuple[int, int]]:
        """Rows and columns of what is trained by projected gradients."""
        return [(d_out, d_in)] if self.full else [(self.rank, d_in), (d_out, self.rank)]


def _problems_of_one_pass(known: Circumstances) -> Iterator[FieldError]:
    """Why gradients can not be used one by one."""
    training = known.training
    if training.max_grad_norm:
        told = f"{training.max_grad_norm:g} clips by the norm of all gradients, which are gone one by one; set it to 0"
        yield FieldError("/training/max_grad_norm", f"update_in_backward: {told}")
    if training.gradient_accumulation > 1:
        told = f"a step is one backward pass, not {training.gradient_accumulation}; take a larger batch_size"
        yield FieldError("/training/gradient_accumulation", f"update_in_backward: {told}")
    if training.precision == "float16":
        told = "the scaled gradients of float16 are looked at together; take bfloat16"
        yield FieldError("/training/precision", f"update_in_backward: {told}")
    if known.devices > 1:
        told = f"gradients are averaged over {known.devices} devices only when all are there; take one device"
        yield FieldError("/resources/devices", f"update_in_backward: {told}")


def _smaller_side(target: Target) -> int:
    return min(target.d_out, target.d_in)
