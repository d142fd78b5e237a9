"""What the jobs that train have in common: the plan in their parameters, and the adapter that they hand over."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from train.catalog import parse_parameters
from train.engine import Plan
from train.settings import EvaluationSettings, TrainingSettings, parse_task
from workers.context import JobContext, NewAdapter, StoredModel

LIBRARIES = ("rankwise", "torch", "transformers", "peft", "accelerate", "diffusers", "opacus")
NAME_LIMIT = 200


def plan_of(context: JobContext) -> Plan:
    """The job's parameters, checked again: they were stored as JSON.

    Raises:
        RequestInvalid: a precision that the device does not have.
    """
    params: Mapping[str, Any] = context.params
    training = TrainingSettings.model_validate(params.get("training") or {})
    if training.precision == "float16" and not context.device.startswith("cuda"):
        problem = f"float16 needs a GPU; this job runs on {context.device}"
        raise RequestInvalid(
            f"{problem}.", hint="Take bfloat16 or float32.", errors=[FieldError("/training/precision", problem)]
        )
    return Plan(
        method=params["method"],
        options=parse_parameters(params["method"], params.get("parameters") or {}),
        task=parse_task(params.get("task") or "causal-lm"),
        training=training,
        evaluation=EvaluationSettings.model_validate(params.get("evaluation") or {}),
        seed=params.get("seed") or 0,
        device=context.device,
        # After the device's memory ran out once, half of a batch at a time: the same sums, in another order.
        micro_batches=2 if context.reduce_memory else 1,
    )


def default_name(dataset: str, method: str) -> str:
    """ "my data (lora)", shortened to what a name may have."""
    tail = f" ({method})"
    return dataset[: NAME_LIMIT - len(tail)] + tail


def described(plan: Plan) -> dict[str, Any]:
    """What every report says of its making."""
    return {
        "parameters": plan.options.model_dump(mode="json"),
        "training": plan.training.model_dump(mode="json"),
        "seed": plan.seed,
        "versions": {library: version(library) for library in LIBRARIES},
    }


def trained_adapter(
    context: JobContext, plan: Plan, output: Path, dataset: str, model: StoredModel, steps: int
) -> NewAdapter:
    """The adapter in `output`; `dataset` is the name of what it was trained on."""
    return NewAdapter(
        directory=output,
        name=context.params.get("name") or default_name(dataset, plan.method),
        description=f"Trained on {dataset} with {plan.method}, {steps} steps.",
        base_model=model.name,
        model_id=model.id,
    )
