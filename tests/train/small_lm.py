"""The first layers of SmolLM2 with the words of some small tasks alone: a language model that learns in seconds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from small_nets import prepare
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.base_model import base_model_directory
from examples.smollm2.tasks import TASKS, make_items

IGNORED = -100
LAYERS = 2
Batch = Mapping[str, Tensor]


class Trained(NamedTuple):
    """Losses on the held-out rows before and after a training, and what was trained."""

    before: float
    after: float
    model: nn.Module
    method: Any


@dataclass
class SmallLanguageModel:
    """The model, its training batches, in which tasks are mixed, and for each task one of rows that are not trained on.

    Attributes:
        held_out: that of the first task.
    """

    model: nn.Module
    batches: list[Batch]
    held_out: Batch
    of_tasks: Mapping[str, Batch]

    @classmethod
    def load(cls, *tasks: str, rows: int = 32, size: int = 4) -> SmallLanguageModel:
        """Args: rows of each task, and of a batch."""
        directory = base_model_directory()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        config = AutoConfig.from_pretrained(directory, num_hidden_layers=LAYERS)
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32)
        train, held_out = (
            {task: [encoded(tokenizer, item) for item in make_items(TASKS[task], split, count)] for task in tasks}
            for split, count in (("train", rows), ("held_out", 16))
        )
        every = [ids for made in (train, held_out) for found in made.values() for ids, _ in found]
        words = sorted({word for ids in every for word in ids})
        keep_words(model, words)
        place = {word: number for number, word in enumerate(words)}
        mixed = [row for task in tasks for row in train[task]]
        if len(tasks) > 1:
            random.Random(0).shuffle(mixed)
        batches = [collated(mixed[start : start + size], place) for start in range(0, len(mixed), size)]
        measured = {task: collated(found, place) for task, found in held_out.items()}
        return cls(model.requires_grad_(False).eval(), batches, measured[tasks[0]], measured)

    def loss(self, model: nn.Module) -> float:
        """Held out, of the first task."""
        return self.losses(model)[next(iter(self.of_tasks))]

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Held out, of each task."""
        with torch.no_grad():
            return {task: float(model.eval()(**batch).loss) for task, batch in self.of_tasks.items()}

    def training_loss(self, model: nn.Module) -> float:
        """Mean over the batches that are trained on."""
        with torch.no_grad():
            return sum(float(model.eval()(**batch).loss) for batch in self.batches) / len(self.batches)

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out tokens that are predicted, each from those before it."""
        with torch.no_grad():
            logits = model.eval()(**self.held_out).logits[:, :-1]
        labels = self.held_out["labels"][:, 1:]
        return float((logits.argmax(-1) == labels)[labels != IGNORED].float().mean())

    def train(
        self,
        name: str,
        parameters: Mapping[str, Any],
        *,
        steps: int,
        learning_rate: float,
        estimate: list[Batch] | None = None,
        change: Callable[[Any], None] | None = None,
        seed: int = 0,
        targets: tuple[str, ...] | None = None,
        shuffled: bool = False,
        linear: bool = False,
    ) -> Trained:
        """AdamW trains what the method makes trainable, with the method's hooks around every step.

        Args:
            estimate: other batches for the method's preparation.
            change: is given the method after it has prepared the model.
            targets: ends of the paths of the adapted layers; all linear ones but the head if unset.
            shuffled: the batches come in an order that the seed draws, another one in every pass.
            linear: the rate falls to 0 along a line.
        """
        torch.manual_seed(seed)
        model = copy.deepcopy(self.model)
        paths = tuple(
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path != "lm_head" and (targets is None or path.endswith(targets))
        )
        method = prepare(
            name,
            parameters,
            model,
            lambda: iter(estimate or self.batches),
            targets=paths,
            seed=seed,
            learning_rate=learning_rate,
        )
        if change is not None:
            change(method)
        before = self.loss(model)
        optimizer = torch.optim.AdamW(
            [value for value in model.parameters() if value.requires_grad], lr=learning_rate, weight_decay=0
        )
        order, drawn = list(range(len(self.batches))), torch.Generator().manual_seed(seed)
        model.train()
        for step in range(steps):
            if shuffled and step % len(order) == 0:
                order = torch.randperm(len(order), generator=drawn).tolist()
            for group in optimizer.param_groups if linear else ():
                group["lr"] = learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            method.before_step(model, step)
            model(**self.batches[order[step % len(order)]]).loss.backward()
            method.before_update(model, step)
            optimizer.step()
            method.after_update(model, step)
        return Trained(before, self.loss(model), model, method)


def encoded(tokenizer: Any, item: Any) -> tuple[list[int], list[int]]:
    """Tokens and labels of an item of `examples.smollm2.tasks`."""
    prompt = tokenizer(item.prompt).input_ids
    completion = [*tokenizer(item.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return [*prompt, *completion], [*[IGNORED] * len(prompt), *completion]


def keep_words(model: Any, words: list[int]) -> None:
    """Leave out all other rows of the embedding, which is the output head as well."""
    kept = nn.Parameter(model.get_input_embeddings().weight.detach()[words].clone())
    model.get_input_embeddings().weight = kept
    model.lm_head.weight = kept
    model.config.vocab_size = model.vocab_size = len(words)


def collated(rows: list[tuple[list[int], list[int]]], place: Mapping[int, int]) -> Batch:
    """A batch whose words have the numbers that `place` gives them."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for number, (ids, labels) in enumerate(rows):
        batch["input_ids"][number, : len(ids)] = torch.tensor([place[word] for word in ids])
        batch["attention_mask"][number, : len(ids)] = 1
        batch["labels"][number, : len(ids)] = torch.tensor([place.get(word, IGNORED) for word in labels])
    return batch
