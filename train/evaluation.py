"""What a model does on rows that it was not trained on, and how sure a difference between two models is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from train.causal_lm import IGNORED, Example, collate
from train.settings import EvaluationSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_RESAMPLED_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Scores:
    """One model on all rows.

    Attributes:
        nll: (rows,) summed negative log likelihood of the counted tokens, nats.
        tokens: (rows,) counted tokens.
        exact: (rows,) 1.0 where the greedy answer is the row's, else 0.0; None if none were written.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]
    exact: NDArray[np.float64] | None

    @property
    def loss(self) -> float:
        """Mean over all counted tokens, nats."""
        return float(self.nll.sum() / self.tokens.sum())

    def to_dict(self) -> dict[str, float]:
        found = {"loss": self.loss, "perplexity": _exp(self.loss)}
        return found if self.exact is None else found | {"exact_match": float(self.exact.mean())}

    def to_lists(self) -> dict[str, Any]:
        """JSON from which `from_lists` makes the same scores."""
        exact = None if self.exact is None else self.exact.tolist()
        return {"nll": self.nll.tolist(), "tokens": self.tokens.tolist(), "exact": exact}

    @classmethod
    def from_lists(cls, lists: dict[str, Any]) -> Scores:
        exact = lists["exact"]
        return cls(np.array(lists["nll"]), np.array(lists["tokens"]), None if exact is None else np.array(exact))


@dataclass(frozen=True, slots=True)
class Difference:
    """After minus before, with the 95 % interval of the paired bootstrap over rows."""

    difference: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    *,
    padding: int,
    batch_size: int,
    tick: Callable[[int], None],
) -> Scores:
    """Measure the model, which is put into evaluation mode.

    Args:
        tick: called with the number of rows measured so far, before each batch.
    """
    model.eval()
    nll: list[float] = []
    tokens: list[float] = []
    exact: list[float] = []
    for start in range(0, len(examples), batch_size):
        tick(start)
        part = examples[start : start + batch_size]
        nll.extend(row_losses(model, part, padding))
        tokens.extend(float(example.counted) for example in part)
        if settings.exact_match:
            exact.extend(float(answers(model, tokenizer, example, settings, padding)) for example in part)
    return Scores(np.array(nll), np.array(tokens), np.array(exact) if settings.exact_match else None)


@torch.no_grad()
def row_losses(model: nn.Module, examples: Sequence[Example], padding: int) -> list[float]:
    """The summed negative log likelihood of each row's counted tokens, nats."""
    batch = {name: value.to(_device(model)) for name, value in collate(examples, padding).items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    found = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        counted = row_labels != IGNORED
        loss = functional.cross_entropy(row_logits[counted].float(), row_labels[counted], reduction="sum")
        found.append(float(loss))
    return found


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    settings: EvaluationSettings,
    padding: int,
) -> bool:
    """Whether the greedy answer to the row's prompt is the row's own, white space at the ends aside."""
    from transformers import GenerationConfig

    prompt = torch.from_numpy(example.ids[: max(example.answer_start, 1)].astype(np.int64))[None].to(_device(model))
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding,
    )
    written = model.generate(  # type: ignore[operator]
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
    )[0, prompt.shape[1] :]
    wanted = example.ids[max(example.answer_start, 1) :].tolist()
    return _text(tokenizer, written.tolist()) == _text(tokenizer, wanted)


def compare(before: Scores, after: Scores, settings: EvaluationSettings, seed: int) -> dict[str, dict[str, float]]:
    """The differences with their intervals: the same rows are drawn for both models."""
    found = {"loss": _bootstrap(before.nll, after.nll, before.tokens, settings.bootstrap, seed).to_dict()}
    if before.exact is not None and after.exact is not None:
        ones = np.ones_like(before.exact)
        found["exact_match"] = _bootstrap(before.exact, after.exact, ones, settings.bootstrap, seed).to_dict()
    return found


def _bootstrap(
    before: NDArray[np.float64], after: NDArray[np.float64], weights: NDArray[np.float64], resamples: int, seed: int
) -> Difference:
    """Of Σ(after − before)/Σ weights over rows drawn with replacement."""
    change, rows = after - before, len(before)
    generator = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED_AT_ONCE // rows)
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, resamples, at_once):
        picks = generator.integers(rows, size=(min(at_once, resamples - start), rows))
        drawn.append(change[picks].sum(axis=1) / weights[picks].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Difference(float(change.sum() / weights.sum()), float(low), float(high))


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _exp(value: float) -> float:
    """e^value; a loss that no float can hold is as bad as the largest one."""
    return math.exp(min(value, 700.0))
