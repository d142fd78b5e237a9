"""The proof of an export: loaded onto a fresh base model, the files give the trained model's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from artifacts.errors import BaseMismatch, FileBroken, FormatUnknown, ReloadMismatch
from train.tasks.protocol import TOLERANCES, Task


@dataclass(frozen=True, slots=True)
class Reload:
    """Differences between predictions (logits; of an image model, predicted noise) on the probe rows.

    Attributes:
        largest_difference: reloaded against trained.
        largest_logit: of the trained model's predictions.
        effect: trained against the base model without an adapter.
    """

    largest_difference: float
    largest_logit: float
    effect: float
    tolerance: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def check_reload(
    task: Task[Any],
    load_adapter: Callable[[nn.Module, Path], nn.Module],
    directory: Path,
    rows: Sequence[Any],
    expected: Sequence[Tensor],
) -> tuple[nn.Module, Reload]:
    """Load the adapter of `directory` as its users would.

    Args:
        load_adapter: (base model, directory) → the base model with the adapter: `TrainMethod.reload`.
        expected: what the trained model predicts for `rows`.

    Returns:
        The fresh base model with the adapter on it, in evaluation mode, and the figures.

    Raises:
        ReloadMismatch: it does not load, or predicts otherwise.
    """
    base = task.load()
    plain = task.predict(base, rows)
    try:
        fresh = load_adapter(base, directory).eval()
    except (ValueError, KeyError, RuntimeError, BaseMismatch, FileBroken, FormatUnknown) as error:
        raise ReloadMismatch(f"The trained adapter can not be loaded: {error}") from error
    got = task.predict(fresh, rows)
    largest = max(1.0, *(float(value.abs().max()) for value in expected))
    figures = Reload(
        largest_difference=_largest(got, expected),
        largest_logit=largest,
        effect=_largest(plain, expected),
        tolerance=TOLERANCES[task.training.precision] * largest,
    )
    if not figures.largest_difference <= figures.tolerance:
        raise ReloadMismatch(
            f"The written adapter, loaded again, gives {task.predicted} that differ by "
            f"{figures.largest_difference:.3g} from those of the trained model; {figures.tolerance:.3g} is allowed."
        )
    return fresh, figures


def _largest(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))
