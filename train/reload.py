"""The proof of an export: loaded onto a fresh base model, the files give the trained model's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from artifacts.errors import BaseMismatch, FileBroken, FormatUnknown, ReloadMismatch
from train.causal_lm import Example, collate
from train.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of a logit, as a share of the largest logit (and at least of 1), by the precision of the base."""


class _HasTraining(Protocol):
    @property
    def training(self) -> TrainingSettings: ...


@dataclass(frozen=True, slots=True)
class Reload:
    """Differences between logits on the probe rows.

    Attributes:
        largest_difference: reloaded against trained.
        largest_logit: of the trained model.
        effect: trained against the base model without an adapter.
    """

    largest_difference: float
    largest_logit: float
    effect: float
    tolerance: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def probe(model: nn.Module, rows: Sequence[Example], padding: int) -> list[Tensor]:
    """The logits of the model on each row, (length, vocabulary) on the CPU in float32."""
    device = next(model.parameters()).device
    found = []
    for row in rows:
        batch = {name: value.to(device) for name, value in collate([row], padding).items() if name != "labels"}
        found.append(model(**batch).logits[0].float().cpu())
    return found


def check_reload(
    load_base: Callable[[], PreTrainedModel],
    load_adapter: Callable[[nn.Module, Path], nn.Module],
    directory: Path,
    rows: Sequence[Example],
    padding: int,
    expected: Sequence[Tensor],
    plan: _HasTraining,
) -> tuple[nn.Module, Reload]:
    """Load the adapter of `directory` as its users would.

    Args:
        load_adapter: (base model, directory) → the base model with the adapter: `TrainMethod.reload`.

    Returns:
        The fresh base model with the adapter on it, in evaluation mode, and the figures.

    Raises:
        ReloadMismatch: it does not load, or gives other logits than `expected`.
    """
    base = load_base()
    plain = probe(base, rows, padding)
    try:
        fresh = load_adapter(base, directory).eval()
    except (ValueError, KeyError, RuntimeError, BaseMismatch, FileBroken, FormatUnknown) as error:
        raise ReloadMismatch(f"The trained adapter can not be loaded: {error}") from error
    got = probe(fresh, rows, padding)
    largest = max(1.0, *(float(value.abs().max()) for value in expected))
    figures = Reload(
        largest_difference=_largest(got, expected),
        largest_logit=largest,
        effect=_largest(plain, expected),
        tolerance=TOLERANCES[plan.training.precision] * largest,
    )
    if not figures.largest_difference <= figures.tolerance:
        raise ReloadMismatch(
            f"The written adapter, loaded again, gives logits that differ by {figures.largest_difference:.3g} from "
            f"those of the trained model; {figures.tolerance:.3g} is allowed."
        )
    return fresh, figures


def _largest(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))
