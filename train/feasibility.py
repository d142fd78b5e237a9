"""Whether the settings of a training agree with one another, with its devices and its base model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from artifacts.base_model import UNET, BaseModelRef
from artifacts.errors import FieldError, RequestInvalid
from train.settings import EvaluationSettings, TaskSettings, TrainingSettings

PIPELINE = "StableDiffusionPipeline"
"""The class of diffusers' pipelines of which text-to-image trains the UNet."""

_Problem = tuple[str, str, str]
"""Pointer, what is wrong, what to do."""


def check_feasible(
    task: TaskSettings, training: TrainingSettings, evaluation: EvaluationSettings, devices: int
) -> None:
    """Refuse what contradicts itself.

    Args:
        devices: among which every batch is shared out.

    Raises:
        RequestInvalid: at /training/batch_size, /training/early_stopping, its metric, or below /evaluation.
    """
    problems = [*_of_devices(training, devices), *_of_measuring(task, training, evaluation)]
    if problems:
        pointer, message, hint = problems[0]
        raise RequestInvalid(
            f"{pointer}: {message}.",
            hint=hint,
            errors=[FieldError(pointer, message) for pointer, message, _ in problems],
        )


def check_base_kind(base: BaseModelRef, task: TaskSettings) -> None:
    """Refuse a base model that is known to be of another kind than the task trains.

    Raises:
        RequestInvalid: at /base_model.
    """
    if task.type == "text-to-image":
        # Of a UNet alone the pipeline is not known: it was registered when that was not looked at.
        found = base.architecture if base.pipeline is None and base.architecture != UNET else base.pipeline
        if found is not None:
            check_pipeline(base.name, found)
    elif base.pipeline is not None:
        problem = f"the base model {base.name!r} is a {base.pipeline}; {task.type} trains a model of transformers"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/base_model", problem)])


def check_pipeline(name: str, found: str) -> None:
    """Refuse a base model of another class than text-to-image trains.

    Raises:
        RequestInvalid: at /base_model.
    """
    if found != PIPELINE:
        problem = f"the base model {name!r} is a {found}; text-to-image trains a {PIPELINE}"
        raise RequestInvalid(
            f"T{problem[1:]}.",
            hint="Give the folder that its save_pretrained wrote.",
            errors=[FieldError("/base_model", problem)],
        )


def _of_devices(training: TrainingSettings, devices: int) -> Iterator[_Problem]:
    if training.batch_size % devices:
        yield (
            "/training/batch_size",
            f"{training.batch_size} rows can not be shared out evenly among {devices} devices",
            "It counts the rows of all devices together: take a multiple of their number.",
        )


def _of_measuring(task: TaskSettings, training: TrainingSettings, evaluation: EvaluationSettings) -> Iterator[_Problem]:
    offered = f"{task.type} measures {', '.join(task.metrics)}"
    if evaluation.exact_match and "exact_match" not in task.metrics:
        yield ("/evaluation/exact_match", offered, "Leave it out: only a model that writes answers can match them.")
    if evaluation.group_column is not None and task.type == "text-to-image":
        yield ("/evaluation/group_column", "images have no columns", "Leave it out.")
    if evaluation.group_column is not None and task.type == "transcript-classification":
        yield ("/evaluation/group_column", "transcripts are told apart by their views alone", "Leave it out.")
    stopping = training.early_stopping
    if stopping is None:
        return
    if evaluation.validation_fraction == 0:
        yield (
            "/training/early_stopping",
            "needs validation rows, and evaluation.validation_fraction is 0",
            "Hold rows out with evaluation.validation_fraction, or leave early_stopping out.",
        )
    if stopping.metric not in task.metrics:
        yield (
            "/training/early_stopping/metric",
            f"{offered}, not {stopping.metric}",
            "Go by one of the metrics that the task has.",
        )
    elif stopping.metric == "exact_match" and not evaluation.exact_match:
        yield (
            "/training/early_stopping/metric",
            "exact_match needs evaluation.exact_match",
            "Set evaluation.exact_match, or go by the loss.",
        )
