"""Whether the settings of a training agree with one another and with the devices that it gets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from artifacts.errors import FieldError, RequestInvalid
from train.settings import EvaluationSettings, TaskSettings, TrainingSettings

_Problem = tuple[str, str, str]
"""Pointer, what is wrong, what to do."""


def check_feasible(
    task: TaskSettings, training: TrainingSettings, evaluation: EvaluationSettings, devices: int
) -> None:
    """Refuse what contradicts itself.

    Args:
        devices: among which every batch is shared out.

    Raises:
        RequestInvalid: at /training/batch_size, /training/early_stopping, its metric, or /evaluation/exact_match.
    """
    problems = [*_of_devices(training, devices), *_of_measuring(task, training, evaluation)]
    if problems:
        pointer, message, hint = problems[0]
        raise RequestInvalid(
            f"{pointer}: {message}.",
            hint=hint,
            errors=[FieldError(pointer, message) for pointer, message, _ in problems],
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
