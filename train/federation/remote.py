"""The steps of a client on a machine of its own, from what the service told it of the round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from artifacts.menu import accepted_parameters
from train.base_files import BaseFiles
from train.catalog import parse_parameters
from train.data import DataFile
from train.engine import Plan
from train.federation.run import Federation, Update
from train.federation.state import ClientFacts, RunState
from train.options.ffa_lora import FfaLoraOptions
from train.settings import EvaluationSettings, TrainingSettings, parse_task


def plan_of_round(told: Mapping[str, Any], device: str) -> Plan:
    """The training as its clients know it.

    Args:
        told: {method, task, parameters, training, seed} of the training.

    Raises:
        RequestInvalid: it is no federated training, or has options that are not known here.
    """
    with accepted_parameters():
        options = parse_parameters(told["method"], told["parameters"])
    return Plan(
        method=told["method"],
        options=options,
        task=parse_task(told.get("task") or "causal-lm"),
        training=TrainingSettings.model_validate(told["training"]),
        evaluation=EvaluationSettings(),
        seed=told["seed"],
        device=device,
    )


def train_round(
    told: Mapping[str, Any],
    adapter: Path,
    base: BaseFiles,
    rows: DataFile,
    folder: Path,
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> Update:
    """What the client makes of the common adapter: the same as a client whose rows the service has.

    Args:
        told: as for `plan_of_round`, with {client, round}; rounds count from 1.
        adapter: the safetensors file that the round begins with.
        folder: for files of its own.
        tick: called before each step; raises to stop.

    Raises:
        RequestInvalid, FileBroken: the base model, the rows or the options do not fit.
    """
    plan = plan_of_round(told, device)
    assert isinstance(plan.options, FfaLoraOptions)
    clients = tuple(ClientFacts(0) for _ in plan.options.clients or ())
    state = RunState(load_file(adapter), clients, round=told["round"] - 1)
    return Federation(plan, base, folder).update(state, told["client"], rows, tick)
