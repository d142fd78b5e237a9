"""Whether the settings of a training agree with one another and with the devices that it gets. Imports no torch."""

from __future__ import annotations

from artifacts.errors import FieldError, RequestInvalid
from train.settings import EvaluationSettings, TrainingSettings

_HINTS = {
    "/training/batch_size": "It counts the rows of all devices together: take a multiple of their number.",
    "/training/early_stopping": "Hold rows out with evaluation.validation_fraction, or leave early_stopping out.",
    "/training/early_stopping/metric": "Set evaluation.exact_match, or go by the loss.",
}


def check_feasible(training: TrainingSettings, evaluation: EvaluationSettings, devices: int) -> None:
    """Refuse what contradicts itself.

    Args:
        devices: among which every batch is shared out.

    Raises:
        RequestInvalid: at /training/batch_size or /training/early_stopping.
    """
    problems = []
    if training.batch_size % devices:
        problems.append(
            FieldError(
                "/training/batch_size",
                f"{training.batch_size} rows can not be shared out evenly among {devices} devices",
            )
        )
    stopping = training.early_stopping
    if stopping is not None and evaluation.validation_fraction == 0:
        problems.append(
            FieldError("/training/early_stopping", "needs validation rows, and evaluation.validation_fraction is 0")
        )
    if stopping is not None and stopping.metric == "exact_match" and not evaluation.exact_match:
        problems.append(FieldError("/training/early_stopping/metric", "exact_match needs evaluation.exact_match"))
    if problems:
        raise RequestInvalid(
            f"{problems[0].pointer}: {problems[0].message}.",
            hint=_HINTS[problems[0].pointer],
            errors=problems,
        )
