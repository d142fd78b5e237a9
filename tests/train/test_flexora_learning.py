"""What Flexora is for: it finds the layers that matter, by what held-out rows say and not by what is trained on."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_lm import collated, encoded, keep_words
from torch import Tensor, nn
from towers import Tower, drive, prepared, squared_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.base_model import base_model_directory
from examples.smollm2.tasks import TASKS, make_items
from train.layer_weights import Choice
from train.methods.flexora import Flexora
from train.options.flexora import FlexoraOptions
from train.protocol import MethodContext
from train.settings import TrainingSettings

LAYERS, WIDTH, ROWS = 6, 16, 160
FIRST, STEPS = 100, 220
SEEDS = range(5)


class Fan(Tower):
    """Its layers stand side by side and read inputs of their own, so that none can do what another one lacks."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, layers, width) → (n, width)."""
        parts = [layer(x[:, number]) for number, layer in enumerate(self.layers)]
        made: Tensor = self.head(torch.stack(parts).sum(dim=0))
        return made


def planted(seed: int) -> tuple[Fan, int, Tensor, Tensor]:
    """A model, and rows of one of which a layer has a change of rank 2."""
    place = seed % LAYERS
    generator = torch.Generator().manual_seed(seed)
    teacher = Fan(LAYERS, WIDTH, seed)
    left, right = (torch.randn(WIDTH, 2, generator=generator) for _ in range(2))
    teacher.layers[place].proj.weight.data += 2.0 * left @ right.T / WIDTH  # type: ignore[union-attr, operator]
    x = torch.randn(ROWS, LAYERS, WIDTH, generator=generator)
    return Fan(LAYERS, WIDTH, seed), place, x, teacher(x).detach()


def made(model: Tower, x: Tensor, y: Tensor, seed: int, **options: Any) -> Flexora:
    return prepared(
        model,
        x,
        y,
        steps=STEPS,
        seed=seed,
        settings={"batch_size": 16},
        selection_steps=FIRST,
        selection="top_k",
        top_k=1,
        validation_rows=40,
        validation_batches=4,
        validation_batch_size=4,
        **options,
    )


def error_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(squared_error(model, {"x": x, "y": y}))


@pytest.mark.slow
@pytest.mark.parametrize("ud_steps", [0, 1])
def test_the_layer_in_which_something_is_to_be_learnt_gets_the_largest_weight(ud_steps: int) -> None:
    found, better = [], []
    for seed in SEEDS:
        model, place, x, y = planted(seed)
        method = made(model, x, y, seed, ud_steps=ud_steps)
        drive(method, model, STEPS)
        assert method.choice is not None
        found.append(method.choice.layers == (place,))
        control, _, _, _ = planted(seed)
        chance = made(control, x, y, seed)
        chance.learnt.choose = lambda rule, count, place=place: Choice(((place + 3) % LAYERS,), "chance")  # type: ignore[method-assign, misc, assignment]
        drive(chance, control, STEPS)
        better.append(error_of(control, x, y) / error_of(model, x, y))
    assert sum(found) >= 4, found
    assert sorted(better)[1] > 3, better


@pytest.mark.slow
def test_a_layer_that_spoils_what_is_held_out_loses_weight_however_useful_it_is_in_training() -> None:
    """The training loss does not see the harm: weights that were learnt on it would grow."""
    weights: dict[bool, list[float]] = {False: [], True: []}
    for seed in SEEDS:
        for spoilt in (False, True):
            model, place, x, y = planted(seed)
            method = made(model, x, y, seed)
            layer = method.layers[f"layers.{place}.proj"]
            noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + 50))

            def harm(module: nn.Module, _: Any, output: Tensor, method: Flexora = method, place: int = place) -> Tensor:
                used = method._dial.weights
                assert used is not None
                return output if module.training else output + 2.0 * used[place] * noise  # noqa: B023

            if spoilt:
                layer.register_forward_hook(harm)
            drive(method, model, FIRST)
            weights[spoilt].append(float(method.learnt.weights[place].detach()))
    assert all(weight < 1 for weight in weights[True]), weights
    assert all(weight > 1 for weight in weights[False]), weights


def trained(seed: int, layers: tuple[int, ...] | None) -> tuple[Flexora, float, int]:
    """On 64 noisy rows, in these layers or those that it chooses; the error on new rows, and how many layers."""
    model, x, y, new_x, new_y = noisy(seed)
    method = prepared(
        model,
        x,
        y,
        steps=STEPS,
        seed=seed,
        settings={"batch_size": 16},
        selection="above_mean",
        selection_steps=FIRST if layers is None else 1,
        validation_rows=24,
        validation_batches=3,
        validation_batch_size=8,
    )
    if layers is not None:
        method.learnt.choose = lambda rule, count: Choice(layers, "given")  # type: ignore[method-assign]
    drive(method, model, STEPS if layers is None else 1 + STEPS - FIRST)  # the second stage is as long in both
    assert method.choice is not None
    return method, error_of(model.eval(), new_x, new_y), len(method.choice.layers)


def noisy(seed: int) -> tuple[Fan, Tensor, Tensor, Tensor, Tensor]:
    """Two layers of six have something to learn, and the targets of the training rows are noisy."""
    generator = torch.Generator().manual_seed(seed)
    teacher = Fan(LAYERS, WIDTH, seed)
    for place in (seed % LAYERS, (seed + 3) % LAYERS):
        left, right = (torch.randn(WIDTH, 2, generator=generator) for _ in range(2))
        teacher.layers[place].proj.weight.data += 2.0 * left @ right.T / WIDTH  # type: ignore[union-attr, operator]
    x, new_x = (torch.randn(count, LAYERS, WIDTH, generator=generator) for count in (64, 400))
    with torch.no_grad():
        noise = torch.randn(64, WIDTH, generator=generator)
        return Fan(LAYERS, WIDTH, seed), x, teacher(x) + 0.25 * noise, new_x, teacher(new_x)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_little_data_the_chosen_layers_generalise_better_than_all_and_than_chance(seed: int) -> None:
    method, chosen, count = trained(seed, None)
    _, everywhere, _ = trained(seed, tuple(range(LAYERS)))
    generator = torch.Generator().manual_seed(seed)
    sets = [tuple(sorted(torch.randperm(LAYERS, generator=generator)[:count].tolist())) for _ in range(3)]
    chance = [trained(seed, layers)[1] for layers in sets]
    assert count <= 0.7 * LAYERS
    assert chosen <= 1.01 * everywhere, (method.learnt.weights, everywhere)
    assert chosen <= sum(chance) / 3, chance


@dataclass(frozen=True)
class FewRows:
    """SmolLM2-135M with the words of one small task, 64 rows to train on and others to measure."""

    base: nn.Module
    words: dict[int, int]
    rows: list[Any]
    held_out: Mapping[str, Tensor]

    @classmethod
    def load(cls) -> FewRows:
        folder = base_model_directory()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows, new = (
            [encoded(tokenizer, item) for item in make_items(TASKS["numbers"], split, count)]
            for split, count in (("train", 64), ("held_out", 48))
        )
        words = sorted({word for ids, _ in rows + new for word in ids})
        place = {word: number for number, word in enumerate(words)}
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        base.config.use_cache = False
        keep_words(base, words)
        return cls(base, place, rows, collated(new, place))

    def train(self, layers: tuple[int, ...] | None, first: int) -> tuple[float, Flexora]:
        """Three passes over the rows in these layers, or in those that are chosen in so many steps before."""
        torch.manual_seed(0)
        model = copy.deepcopy(self.base)
        held = {"validation_rows": 16, "validation_batches": 2, "validation_batch_size": 4}
        method = Flexora(FlexoraOptions(rank=8, selection="above_mean", selection_steps=first, **held))
        context = MethodContext(
            [f"model.layers.{number}.self_attn.{name}" for number in range(30) for name in ("q_proj", "v_proj")],
            first + 3 * 64 // 8,
            lambda: iter(()),
            TrainingSettings(learning_rate=3e-3, schedule="cosine", batch_size=8),
            rows=64,
            batch_of=lambda numbers: collated([self.rows[number] for number in numbers], self.words),
        )
        method.prepare(model, context)
        if layers is not None:
            method.learnt.choose = lambda rule, count: Choice(layers, "given")  # type: ignore[method-assign]
        drive(method, model, context.total_steps)
        with torch.no_grad():
            return float(model.eval()(**self.held_out).loss), method


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_64_rows_the_chosen_layers_of_a_real_model_learn_more_than_as_many_of_chance() -> None:
    """Three passes over so few rows do not over-fit at this rate, so that all layers are better still."""
    data = FewRows.load()
    chosen, method = data.train(None, 12)
    assert method.choice is not None
    count = len(method.choice.layers)
    everywhere, _ = data.train(tuple(range(30)), 1)
    drawn = random.Random(0)
    chance = [data.train(tuple(sorted(drawn.sample(range(30), count))), 1)[0] for _ in range(3)]
    print(f"{count} of 30 layers {chosen:.3f}, all {everywhere:.3f}, of chance {[round(loss, 3) for loss in chance]}")
    assert count <= 0.7 * 30
    assert chosen <= sum(chance) / 3
    assert chosen <= 1.2 * everywhere
