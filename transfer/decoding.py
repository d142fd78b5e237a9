"""Writing tokens row by row in a batch: whole rows end at their own end, and leave the batch.

Which rows share a batch changes a logit by rounding (1e-6 or so), so what shares one is settled by the numbers of the
rows alone, never by what happens to be finished: the same rows give the same text whenever they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from artifacts.errors import FieldError, TransferRefused
from train.tasks.text_batches import device_of, padding_of
from transfer.candidates import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Choice = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits (n, vocabulary) in float32, the rows' numbers in the batch, step) → (n,) token ids."""


@dataclass(frozen=True, slots=True)
class Written:
    """The text of a row without what ended it."""

    text: str
    finish: Finish


@dataclass(frozen=True, slots=True)
class Limits:
    """When a row ends.

    Attributes:
        max_new_tokens: the most that are written.
        ends: token ids that end a text.
        stop: text that does, if any.
        vocabulary: ids from here on are no tokens of the tokenizer, and are never written.
    """

    max_new_tokens: int
    ends: frozenset[int]
    stop: str | None
    vocabulary: int

    @classmethod
    def of(cls, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stop: str | None) -> Limits:
        return cls(max_new_tokens, end_tokens(model, tokenizer), stop, len(tokenizer))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a text, as the tokenizer and the model's own configuration have them."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(token) for token in [*found, tokenizer.eos_token_id] if token is not None)


def check_room(model: Any, prompt: int, max_new_tokens: int, pointer: str) -> None:
    """Raises TransferRefused when a prompt of so many tokens and its continuation are longer than the model reads."""
    limit = getattr(model.config, "max_position_embeddings", None)
    prompt += getattr(model, "virtual_tokens", 0)
    if limit is not None and prompt + max_new_tokens > limit:
        raise TransferRefused(
            f"A prompt of {prompt} tokens and {max_new_tokens} new ones are more than the {limit} that the base model "
            "was made for.",
            hint="Take fewer or shorter seeds, or fewer new tokens.",
            errors=[FieldError(pointer, f"at most {max(limit - prompt, 0)} are left after the prompt")],
        )


@dataclass(slots=True)
class _Rows:
    """The rows that are not finished, in a batch of their own."""

    cache: Any
    mask: Tensor | None
    numbers: list[int]
    ids: dict[int, list[int]] = field(default_factory=dict)

    def keep(self, kept: Sequence[int], device: torch.device) -> None:
        """Leave only the rows at these places of the batch."""
        places = torch.tensor(kept, device=device)
        self.cache.batch_select_indices(places)
        self.mask = None if self.mask is None else self.mask[places]
        self.numbers = [self.numbers[place] for place in kept]


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    start: tuple[Tensor, Any, Tensor | None],
    limits: Limits,
    choose: Choice,
) -> list[Written]:
    """Go on with a batch until every row has ended.

    Args:
        start: logits (n, vocabulary) of the first new token, the cache of what stands before it, and the mask (n,
            length) of that, or None if no row is padded.
    """
    logits, cache, mask = start
    device = device_of(model)
    rows = _Rows(cache, mask, list(range(len(logits))), {number: [] for number in range(len(logits))})
    found: dict[int, Written] = {}
    for step in range(limits.max_new_tokens):
        allowed = logits[:, : limits.vocabulary].float()
        chosen = choose(allowed, rows.numbers, step)
        kept = []
        for place, (number, token) in enumerate(zip(rows.numbers, chosen.tolist(), strict=True)):
            ended = _ended(tokenizer, rows.ids[number], token, limits, last=step + 1 == limits.max_new_tokens)
            if ended is None:
                kept.append(place)
            else:
                found[number] = ended
        if not kept:
            break
        if len(kept) < len(rows.numbers):
            rows.keep(kept, device)
            chosen = chosen[torch.tensor(kept, device=chosen.device)]
        logits = _next_logits(model, rows, chosen.to(device))
    return [found[number] for number in range(len(found))]


def _ended(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], token: int, limits: Limits, *, last: bool
) -> Written | None:
    """What a row is after its next token, if it ends with it; `ids` gets the token."""
    if token in limits.ends:
        return Written(text_of(tokenizer, ids), "end")
    ids.append(token)
    if limits.stop is not None:
        text = text_of(tokenizer, ids)
        # A stop at the very beginning ends nothing: models like to begin an answer with a line end.
        cut = text.find(limits.stop, len(text) - len(text.lstrip()))
        if cut >= 0:
            return Written(text[:cut], "stop")
    return Written(text_of(tokenizer, ids), "length") if last else None


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, just as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _next_logits(model: Any, rows: _Rows, chosen: Tensor) -> Tensor:
    more: dict[str, Any] = {}
    if rows.mask is not None:
        rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.mask), 1)], dim=1)
        more = {"attention_mask": rows.mask, "position_ids": rows.mask.sum(dim=1, keepdim=True) - 1}
    output = model(input_ids=chosen[:, None], past_key_values=rows.cache, use_cache=True, logits_to_keep=1, **more)
    logits: Tensor = output.logits[:, -1]
    return logits


def left_padded(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts whose last tokens stand in one column: input_ids, attention_mask and position_ids, each (n, longest)."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in batch.items()}


def last_logits(model: Any, prompts: Sequence[Sequence[int]], padding: int) -> Tensor:
    """(n, vocabulary) float32 logits after the last token of each prompt. Only those go through the output layer."""
    batch = left_padded(prompts, padding, device_of(model))
    logits: Tensor = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.float()


def batches_by_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Places of prompts of similar length, `size` at a time: decided by the prompts alone."""
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def answer_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], limits: Limits
) -> list[Written]:
    """Greedy continuations of prompts that make up one batch."""
    from transformers import DynamicCache

    batch = left_padded(prompts, padding_of(tokenizer), device_of(model))
    check_room(model, batch["input_ids"].shape[1], limits.max_new_tokens, "/parameters/answer_tokens")
    output = model(**batch, past_key_values=DynamicCache(config=text_config(model)), use_cache=True, logits_to_keep=1)
    start = (output.logits[:, -1], output.past_key_values, batch["attention_mask"])
    return write(model, tokenizer, start, limits, lambda logits, _rows, _step: logits.argmax(dim=-1))


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], limits: Limits, batch_size: int
) -> list[Written]:
    """Greedy continuations, in the order of the prompts."""
    found: dict[int, Written] = {}
    for places in batches_by_length(prompts, batch_size):
        written = answer_batch(model, tokenizer, [prompts[place] for place in places], limits)
        found.update(zip(places, written, strict=True))
    return [found[place] for place in range(len(prompts))]


def text_config(model: Any) -> Any:
    """The configuration that tells a cache which layers attend to a window only."""
    return model.config.get_text_config(decoder=True)
