"""What the menu of training methods says of one method. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from artifacts.errors import FieldError, RequestInvalid
from train.options.common import TrainOptions
from train.settings import TaskName

if TYPE_CHECKING:
    from train.protocol import TrainMethod

ALL_TASKS: tuple[TaskName, ...] = get_args(TaskName)
TEXT_TASKS: tuple[TaskName, ...] = ("causal-lm", "sequence-classification", "token-classification")
Export = Literal["lora", "dora", "vera", "miss", "bat_row", "loftq", "lq_lora", "smora", "prompt_tuning", "model"]
PLAIN = ("lora", "rslora")
"""The types of adapters whose ΔW is scaling·B·A."""


@dataclass(frozen=True, slots=True)
class Form:
    """What comes out of a training.

    Attributes:
        exports: what the adapter is: "lora" is a plain LoRA, bat_row is a type of Rankwise's own, "model" is a base
            model and no adapter, any other is PEFT's type of that name.
        mergeable: the adapter can go into `POST /merge`.
    """

    exports: Export
    mergeable: bool


@dataclass(frozen=True, slots=True)
class Capabilities(Form):
    """What a method gives.

    Attributes:
        exports, mergeable: with the parameters' defaults.
        tasks: what it can be trained on.
        variants: what comes out instead with that value of the parameter `variant`, or `mode`.
        continues: the types of stored adapters that it can go on from (`continue_from`).
    """

    tasks: tuple[TaskName, ...] = ALL_TASKS
    variants: Mapping[str, Form] = field(default_factory=dict)
    continues: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the menu. `implementation` is imported in a worker only.

    Attributes:
        when: when to take it rather than another, whole sentences.
        cost: parameters, time and memory beside LoRA of the same rank.
        output: what comes out, and what loads it.
    """

    name: str
    title: str
    summary: str
    when: str
    cost: str
    output: str
    options: type[TrainOptions]
    implementation: str
    arxiv: str | None
    reference_url: str
    capabilities: Capabilities

    def form(self, options: TrainOptions) -> Form:
        """What comes out with these options."""
        if getattr(options, "lossy_rank", None) is not None:
            return Form(exports="lora", mergeable=True)
        chosen = getattr(options, "variant", None) or getattr(options, "mode", None)
        return self.capabilities.variants.get(str(chosen), self.capabilities)

    def check_task(self, task: TaskName) -> None:
        """Raises RequestInvalid when the method can not be trained on the task."""
        if task not in self.capabilities.tasks:
            known = ", ".join(self.capabilities.tasks)
            raise RequestInvalid(
                f"{self.title} can not be trained on the task {task}.",
                hint=f"It can be on {known}; for {task} take another method, such as lora.",
                errors=[FieldError("/task/type", f"{self.name} trains {known}")],
            )

    def load(self, options: TrainOptions) -> TrainMethod[Any]:
        """Import the implementation (torch) and make one for these options."""
        module, _, name = self.implementation.partition(":")
        made: TrainMethod[Any] = getattr(importlib.import_module(module), name)(options)
        return made
