"""Stage generate: inputs that the target base model invents after the seeds.

The prompt is the same for all candidates: its keys and values are computed once and shared by every batch. A batch
holds `batch_size` consecutive indices, always all of them: the unit that is written, kept and redone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.tasks.text_batches import device_of
from transfer.candidates import Candidate
from transfer.decoding import Limits, check_room, text_config, write
from transfer.prompts import Stop, generator_prompt, stop_of, stop_text
from transfer.sampling import Draws, Sampling, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What decides the candidates besides the model, the seeds and the key.

    Attributes:
        max_new_tokens: longest input; one that reaches it counts as cut off.
        batch_size: candidates of one batch.
        stop: where an input ends; None: as `transfer.prompts.stop_of` finds.
    """

    sampling: Sampling
    max_new_tokens: int = 64
    batch_size: int = 32
    stop: Stop | None = None


class InputGenerator:
    """Writes candidates with one model. Raises TransferRefused when the seeds leave no room for them."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, seeds: Sequence[str], settings: GenerationSettings
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        stop = stop_text(settings.stop or stop_of(seeds), len(seeds))
        self._limits = Limits.of(model, tokenizer, settings.max_new_tokens, stop)
        ids = list(tokenizer(generator_prompt(seeds))["input_ids"])
        check_room(model, len(ids), settings.max_new_tokens, "/parameters/input_tokens")
        self._prefill(ids)

    @torch.inference_mode()
    def _prefill(self, ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        prompt = torch.tensor([list(ids)], device=device_of(self._model))
        cache = DynamicCache(config=text_config(self._model))
        output = self._model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._first, self._cache = output.logits[:, -1], output.past_key_values

    def batch(self, key: str, number: int) -> list[Candidate]:
        """The candidates of batch `number`, which counts from 0, under the job's key."""
        size = self._settings.batch_size
        return self.candidates(key, range(number * size, (number + 1) * size))

    @torch.inference_mode()
    def candidates(self, key: str, indices: Sequence[int]) -> list[Candidate]:
        """The candidates of any indices, as one batch."""
        draws = Draws(key, indices, self._settings.max_new_tokens)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(indices))
        start = (self._first.expand(len(indices), -1), cache, None)

        def choose(logits: torch.Tensor, rows: Sequence[int], step: int) -> torch.Tensor:
            return draw(logits, self._settings.sampling, draws.at(rows, step))

        written = write(self._model, self._tokenizer, start, self._limits, choose)
        return [Candidate(index, item.text, item.finish) for index, item in zip(indices, written, strict=True)]
