"""Stage 0, while the training data is still there: the adapter that tells its inputs from invented ones.

The only stage that reads the data, and of it the inputs alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from artifacts.errors import FieldError, TransferRefused
from train.base_files import BaseFiles
from train.catalog import find_method
from train.data import DataFile
from train.engine import Inputs, TrainObserver, train_adapter
from train.settings import CausalLmTask
from train.tasks.causal_lm import CausalLm
from train.tasks.causal_rows import Example
from train.tasks.protocol import TaskContext
from train.tasks.rows import IGNORED
from transfer.distillation import Distillation
from transfer.filters.discriminator import Discriminator, DiscriminatorRecipe
from transfer.seeds import folded
from transfer.source_model import load_adapted
from transfer.statistics import auc

HELD_OUT_SHARE = 0.2
LEAST_HELD_OUT = 2


@dataclass(frozen=True, slots=True)
class DiscriminatorReport:
    """How well a discriminator tells held-out inputs apart: counts and rates only.

    Attributes:
        auc: the chance that a real input scores above an invented one.
        accepted: share of the real ones with a score above 0.
        rejected: share of the invented ones with a score of 0 or less.
        trained, held_out: inputs of each kind.
    """

    auc: float
    accepted: float
    rejected: float
    trained: int
    held_out: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LabelledInputs:
    """Real and invented inputs, as many of either, to train on and to measure with."""

    real: tuple[str, ...]
    invented: tuple[str, ...]
    held_out_real: tuple[str, ...]
    held_out_invented: tuple[str, ...]

    @classmethod
    def of(cls, real: Sequence[str], invented: Sequence[str]) -> LabelledInputs:
        """The inputs, each once, balanced, and a fifth of either kind held out, chosen by the hash of the text.

        Raises:
            TransferRefused: too few are left of one kind.
        """
        own = _once(real, frozenset())
        other = _once(invented, frozenset(map(folded, own)))
        count = min(len(own), len(other))
        measured = max(int(count * HELD_OUT_SHARE), LEAST_HELD_OUT)
        if count - measured < 1:
            raise TransferRefused(
                f"A discriminator can not be trained on {len(own)} different inputs and {len(other)} invented ones.",
                hint="Train it on a dataset with more inputs.",
                errors=[FieldError("/dataset", "too few different inputs")],
            )
        own, other = own[:count], other[:count]
        return cls(own[measured:], other[measured:], own[:measured], other[:measured])

    def rows(self) -> bytes:
        """The training rows as JSON Lines, the two kinds in turns."""
        pairs = zip(self.real, self.invented, strict=True)
        made = (row for real, invented in pairs for row in ({"x": real, "real": True}, {"x": invented, "real": False}))
        return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in made).encode()


class AnswerToken(CausalLm):
    """Rows with an input `x` and whether it is `real`; the loss counts the one token of the answer."""

    def __init__(self, settings: CausalLmTask, context: TaskContext, recipe: DiscriminatorRecipe) -> None:
        super().__init__(settings, context)
        self._recipe = recipe
        self._yes, self._no = recipe.answer_ids(self.tokenizer)

    def encode(self, row: Mapping[str, Any], cut: int | None) -> Example:
        asked = self._recipe.encode(str(row["x"]), self.tokenizer)
        answer = self._yes if row["real"] else self._no
        ids = np.array([*asked, answer], np.int32)
        labels = np.array([*[IGNORED] * len(asked), answer], np.int32)
        example = Example(ids, labels, len(asked))
        return example if cut is None else example.cut(cut)


def train_discriminator(
    inputs: LabelledInputs,
    recipe: DiscriminatorRecipe,
    how: Distillation,
    base: BaseFiles,
    folder: Path,
    output: Path,
    observer: TrainObserver,
    resume: Path | None = None,
) -> DiscriminatorReport:
    """Train the adapter on the source base (arXiv:2405.17258, eq. 1), and measure it on what was held out.

    Args:
        inputs: the data's, and what the generator made of the seeds with the source base.
        how: the same as the task's adapter was trained with.
        folder: the training's own, into which its rows are written and from which they are removed.
        resume: an unpacked checkpoint of the same training.

    Raises:
        TransferRefused: the answers are no single tokens.
        As `train.engine.train_adapter`.
    """
    rows = folder / "rows.jsonl"
    rows.write_bytes(inputs.rows())
    method = find_method(how.method).load(how.options)
    make = partial(AnswerToken, recipe=recipe)
    try:
        train_adapter(how.plan(), method, Inputs(base, DataFile(rows, "jsonl"), folder, resume), output, observer, make)
    finally:
        rows.unlink()
    return measure(inputs, recipe, base, output, how.training.batch_size, how.device)


def measure(
    inputs: LabelledInputs, recipe: DiscriminatorRecipe, base: BaseFiles, adapter: Path, batch_size: int, device: str
) -> DiscriminatorReport:
    """The discriminator on the held-out inputs."""
    judge = Discriminator(load_adapted(base, {"discriminator": adapter}, device=device), base.tokenizer(), recipe)
    real = judge.scores(inputs.held_out_real, batch_size)
    invented = judge.scores(inputs.held_out_invented, batch_size)
    found = auc(real, invented)
    assert found is not None
    return DiscriminatorReport(
        auc=found,
        accepted=sum(score > 0 for score in real) / len(real),
        rejected=sum(score <= 0 for score in invented) / len(invented),
        trained=len(inputs.real),
        held_out=len(real),
    )


def _once(texts: Sequence[str], without: frozenset[str]) -> tuple[str, ...]:
    """Each text once, in an order that only the texts decide."""
    found = {folded(text): text for text in reversed(texts)}
    kept = [(hashlib.sha256(key.encode()).digest(), text) for key, text in found.items() if key and key not in without]
    return tuple(text for _, text in sorted(kept))
