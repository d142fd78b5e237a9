"""The task causal-lm: predict the next token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.data import DataFile, Examples, SplitRows, counts, listed
from train.evaluation import Scores
from train.settings import CausalLmTask, EvaluationSettings
from train.tasks.causal_rows import Example, collate, encode_row
from train.tasks.packing import Pack, check_separate, collate_packs, pack
from train.tasks.protocol import TOLERANCES, Loss, Task, TaskContext
from train.tasks.rows import IGNORED, encode_rows, row_limit
from train.tasks.text_batches import device_of, moved, padding_of, ready_transformer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_LARGEST_EXPONENT = 700.0  # e^value of a loss that no float can hold is as bad as the largest one


class CausalLm(Task[CausalLmTask]):
    """The loss is the model's own, but only what predicts a counted token goes through the output layer, where the
    model lets it: with a large vocabulary that layer costs as much as the rest of the model.
    """

    peft_type: ClassVar[str | None] = "CAUSAL_LM"

    def __init__(self, settings: CausalLmTask, context: TaskContext) -> None:
        super().__init__(settings, context)
        self.tokenizer = self.base.tokenizer()
        self.padding = padding_of(self.tokenizer)
        self._keeps_logits = False

    def read(self, file: DataFile, evaluation: EvaluationSettings) -> Examples:
        limit = row_limit(self.settings.max_length, self.base.config())
        rows = SplitRows(file, evaluation.validation_fraction, evaluation.group_column)
        encoded = encode_rows(rows, self.encode, self.settings.overlong, limit)
        train, validation = rows.parted(encoded.numbers, encoded.examples)
        packs = pack(train, limit) if self.settings.packing else None
        report = counts(
            train,
            validation,
            evaluation,
            training_tokens=sum(example.length for example in train),
            counted_tokens=sum(example.counted for example in train),
            longest_row=max(example.length for example in train),
            row_limit=limit,
            dropped_rows=listed(encoded.dropped),
            cut_rows=listed(encoded.cut),
            **({} if packs is None else {"packs": len(packs)}),
        )
        groups = rows.groups(encoded.numbers, evaluation.max_rows, packed=packs is not None)
        return Examples(train if packs is None else packs, validation[: evaluation.max_rows], report, groups)

    def encode(self, row: Mapping[str, Any], cut: int | None) -> Example:
        """A row as tokens, at most `cut` of them. Raises RowProblemError."""
        return encode_row(row, self.tokenizer, self.settings, cut)

    def load(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        kind = "causal language model"
        model: nn.Module = self.base.load(AutoModelForCausalLM, kind, dtype=self.training.precision, device=self.device)
        return model

    def check(self, model: nn.Module, examples: Examples) -> None:
        if self.settings.packing:
            check_separate(model, examples.train, self.padding, TOLERANCES[self.training.precision])

    def before_training(self, model: Any) -> None:
        ready_transformer(model, self.training)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def step_inputs(self, batch: dict[str, Any], epoch: int) -> dict[str, Any]:
        del epoch
        return last_counted(batch) if self._keeps_logits else batch

    def loss(self) -> Loss | None:
        return counted_loss if self._keeps_logits else None

    def collate(self, examples: Sequence[Example | Pack]) -> dict[str, Tensor]:
        packs = [example for example in examples if isinstance(example, Pack)]
        if packs:
            return collate_packs(packs, self.padding)
        return collate([example for example in examples if isinstance(example, Example)], self.padding)

    def words(self, text: str) -> Sequence[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokens(self, example: Example | Pack) -> int:
        return example.length

    def score(
        self, model: nn.Module, examples: Sequence[Example], evaluation: EvaluationSettings, tick: Callable[[int], None]
    ) -> CausalScores:
        model.eval()
        nll: list[float] = []
        exact: list[float] = []
        size = self.training.batch_size
        for start in range(0, len(examples), size):
            tick(start)
            part = examples[start : start + size]
            nll.extend(row_losses(model, part, self.padding))
            if evaluation.exact_match:
                exact.extend(
                    float(answers(model, self.tokenizer, example, evaluation.max_new_tokens, self.padding))
                    for example in part
                )
        tokens = np.array([float(example.counted) for example in examples])
        return CausalScores(np.array(nll), tokens, np.array(exact) if evaluation.exact_match else None)

    def scores_of(self, columns: Mapping[str, Any]) -> CausalScores:
        exact = columns["exact"]
        return CausalScores(
            np.array(columns["nll"]), np.array(columns["tokens"]), None if exact is None else np.array(exact)
        )

    @torch.no_grad()
    def predict(self, model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
        """The logits, (length, vocabulary) each; of virtual tokens before the row none."""
        found = []
        for example in examples:
            batch = self.collate([example])
            del batch["labels"]
            logits = model(**moved(batch, device_of(model))).logits[0, -example.length :]
            found.append(logits.float().cpu())
        return found


@dataclass(frozen=True, slots=True)
class CausalScores(Scores):
    """A language model on all rows.

    Attributes:
        nll: (rows,) summed negative log likelihood of the counted tokens, nats.
        tokens: (rows,) counted tokens.
        exact: (rows,) 1.0 where the greedy answer is the row's, else 0.0; None if none were written.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]
    exact: NDArray[np.float64] | None

    @property
    def rows(self) -> int:
        return len(self.nll)

    def figures(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """The loss is the mean over all counted tokens, nats."""
        loss = weights @ self.nll / (weights @ self.tokens)
        found = {"loss": loss, "perplexity": np.exp(np.minimum(loss, _LARGEST_EXPONENT))}
        return found if self.exact is None else found | {"exact_match": weights @ self.exact / weights.sum(axis=1)}

    def to_lists(self) -> dict[str, Any]:
        exact = None if self.exact is None else self.exact.tolist()
        return {"nll": self.nll.tolist(), "tokens": self.tokens.tolist(), "exact": exact}


def last_counted(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the labels (rows, kept) of its last positions alone, those from the first that predicts a counted
    token on, and `logits_to_keep` for the model. What stands before the rows, such as virtual tokens, changes nothing.
    """
    wanted = batch["labels"][:, 1:]
    columns = (wanted != IGNORED).any(dim=0).nonzero()
    # Without a counted token one column stays, so that a loss of 0 has a gradient.
    first = int(columns[0]) if len(columns) else wanted.shape[1] - 1
    labels = functional.pad(wanted[:, first:], (0, 1), value=IGNORED)
    return {**batch, "labels": labels, "logits_to_keep": labels.shape[1]}


def counted_loss(outputs: Any, labels: Tensor, items: Tensor) -> Tensor:
    """Σ of the negative log likelihoods of the counted tokens over `items`; the logits are those of `last_counted`."""
    logits = outputs.logits.flatten(0, 1).float()
    total = functional.cross_entropy(logits, labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum")
    return total / items


@torch.no_grad()
def row_losses(model: nn.Module, examples: Sequence[Example], padding: int) -> list[float]:
    """The summed negative log likelihood of each row's counted tokens, nats."""
    batch = moved(collate(examples, padding), device_of(model))
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]  # virtual tokens may stand before the rows
    found = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        counted = row_labels != IGNORED
        loss = functional.cross_entropy(row_logits[counted].float(), row_labels[counted], reduction="sum")
        found.append(float(loss))
    return found


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, example: Example, max_new_tokens: int, padding: int
) -> bool:
    """Whether the greedy answer to the row's prompt is the row's own, white space at the ends aside."""
    from transformers import GenerationConfig

    prompt = torch.from_numpy(example.ids[: max(example.answer_start, 1)].astype(np.int64))[None].to(device_of(model))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding,
    )
    written = model.generate(  # type: ignore[operator]
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
    )[0, prompt.shape[1] :]
    wanted = example.ids[max(example.answer_start, 1) :].tolist()
    return _text(tokenizer, written.tolist()) == _text(tokenizer, wanted)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
