"""What the benchmark of the training methods compares, and what each is to reach. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from train.catalog import METHODS

MEMORY_GOAL = 1.1
TRANSCRIPTS: Literal["LoRA, transcripts"] = "LoRA, transcripts"
"""PEFT's LoRA on a BERT of k-mers, whose classifier and pooler are trained whole."""


@dataclass(frozen=True)
class Case:
    """One line of the table: a method with some parameters.

    Attributes:
        time_goal, memory_goal: largest ratio to the stock method of the same rank; None: only reported.
        stock: that method, of PEFT.
        packed: on the base model in four bits a weight.
        clips: gradients are scaled down to a common norm; not where a method frees each at once.
        measured_from: the share of the steps after which they count, for a method that does something else before.
        measured_to: the share up to which they count.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    time_goal: float | None = None
    memory_goal: float | None = None
    measured_from: float = 0.0
    measured_to: float = 1.0
    stock: Literal["LoRA", "DoRA", "LoRA, transcripts"] = "LoRA"
    packed: bool = False
    clips: bool = True


def _goals(name: str, method: str, time_goal: float, parameters: Mapping[str, Any], **more: Any) -> Case:
    return Case(name, method, parameters, time_goal, MEMORY_GOAL, **more)


def _bone(rank: int) -> list[Case]:
    return [
        _goals("bone", "bone", 1.0, {"rank": rank}),
        _goals("bone, bat_row", "bone", 1.3, {"rank": rank, "variant": "bat_row"}),
        Case("bone, bat_col", "bone", {"rank": rank, "variant": "bat_col"}),
        Case("bone, mini", "bone", {"rank": rank, "variant": "mini", "mini_r": rank}),
    ]


def _increlora(rank: int) -> list[Case]:
    """Left alone, the rounds take half of the steps; after them nothing is scored and the rank is the full one."""
    part = max(rank // 4, 1)
    parameters = {"initial_rank": rank - part, "target_rank": rank, "increment": part}
    return [_goals("increlora, after its growth", "increlora", 1.3, parameters, measured_from=0.6)]


def _flexora(rank: int) -> list[Case]:
    """In each step of the first stage one held-out batch of the usual four rows; in the second, half of six layers."""
    parameters = {
        "rank": rank,
        "selection_steps": 10,
        "selection": "top_k",
        "top_k": 3,
        "validation_rows": 8,
        "validation_batches": 1,
        "validation_batch_size": 4,
    }
    return [
        _goals("flexora, first stage", "flexora", 2.2, parameters, measured_to=0.5),
        Case("flexora, first stage, unrolled", "flexora", parameters | {"ud_steps": 1}, measured_to=0.5),
        _goals("flexora, second stage", "flexora", 1.0, parameters, measured_from=0.6),
    ]


def _gradnormlorp(rank: int) -> list[Case]:
    """The second line's moments have the 4096 numbers from which 8 bits are taken; the last two train whole weights."""
    eight, whole = {"rank": rank, "optim_bits": 8}, {"mode": "full", "proj_rank": rank}
    at_once = whole | {"update_in_backward": True}
    return [
        _goals("gradnormlorp", "gradnormlorp", 1.15, {"rank": rank}, stock="DoRA"),
        _goals("gradnormlorp, 8 bits", "gradnormlorp", 1.15, eight, stock="DoRA"),
        Case("gradnormlorp, whole weights", "gradnormlorp", whole, stock="DoRA"),
        Case("gradnormlorp, whole weights, in the backward pass", "gradnormlorp", at_once, stock="DoRA", clips=False),
    ]


def _lora_bert(rank: int) -> list[Case]:
    """On a BERT of k-mers; the second line trains all of its weights, beside the same stock method."""
    return [
        _goals("lora-bert", "lora-bert", 1.05, {"rank": rank}, stock=TRANSCRIPTS),
        Case("lora-bert, all weights", "lora-bert", {"mode": "full"}, stock=TRANSCRIPTS),
    ]


SPECIAL: Mapping[str, Callable[[int], list[Case]]] = {
    "allora": lambda rank: [
        _goals("allora", "allora", 1.15, {"rank": rank}),
        _goals("allora, update", "allora", 1.15, {"rank": rank, "placement": "update"}),
    ],
    "dylora": lambda rank: [_goals("dylora", "dylora", 1.05, {"rank": rank})],
    "flexora": _flexora,
    "gradnormlorp": _gradnormlorp,
    "increlora": _increlora,
    "bone": _bone,
    "lora-bert": _lora_bert,
    "lora-sb": lambda rank: [_goals("lora-sb", "lora-sb", 1.0, {"rank": rank})],
    "lq-lora": lambda rank: [Case("lq-lora, 4 bits", "lq-lora", {"rank": rank}, 1.6, packed=True)],
    "nlora": lambda rank: [_goals("nlora", "nlora", 1.1, {"rank": rank})],
    "slora": lambda rank: [_goals("slora", "slora", 1.1, {"rank": rank})],
    "inttune": lambda rank: [_goals("inttune", "inttune", 1.1, {"rank": rank})],
    "adalora": lambda rank: [Case("adalora", "adalora", {"target_rank": rank, "initial_rank": rank + (rank + 1) // 2})],
    "smora": lambda rank: [_goals("smora", "smora", 1.5, {"rank": rank, "active_rank": max(rank // 4, 1)})],
    "prompt-tuning": lambda _rank: [Case("prompt-tuning, 20 vectors", "prompt-tuning")],
    "vera": lambda _rank: [Case("vera, rank 256", "vera", {"rank": 256})],
}
"""Methods with goals, with several lines, or whose parameters have other names; any other has one line, with `rank`."""


def cases(rank: int, wanted: Sequence[str] = ()) -> list[Case]:
    """The lines for the methods of the menu (or those `wanted`), in the menu's order."""
    found: list[Case] = []
    for name in METHODS:
        if not wanted or name in wanted:
            found += SPECIAL[name](rank) if name in SPECIAL else [Case(name, name, {"rank": rank})]
    return found
