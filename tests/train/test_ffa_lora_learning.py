"""What FFA-LoRA does to accuracy and privacy, on scanned digits: three clients whose labels are skewed, ε = 1, and an
attack that guesses from the loss who was trained on. The figures are in docs/explanation/ffa-lora.md."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federated_nets import adapted
from sklearn.datasets import load_digits
from torch import Tensor, nn

from train.federation.accounting import noise_for, spent
from train.federation.averaging import average, shares
from train.federation.local_steps import LocalPlan, Noise, seed_of, train_locally
from train.settings import TrainingSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLIENTS, LABELS, CHANCE = 3, 10, 0.1
SKEW = 0.05
"""Of each label, what each of the two clients gets that have little of it: 90, 5 and 5 %."""


class Net(nn.Module):
    """Images (rows, 64) → logits (rows, 10)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, LABELS)

    def forward(self, images: Tensor) -> SimpleNamespace:
        hidden = torch.relu(self.second(torch.relu(self.first(images))))
        return SimpleNamespace(outputs=self.head(hidden))


class Digits:
    """A net that was trained on 600 digits, and others that lie one pixel to the right, where it does badly."""

    def __init__(self) -> None:
        found = load_digits()
        images = torch.tensor(found.data, dtype=torch.float32) / 16
        self.labels = torch.tensor(found.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.base = self._pretrained(images[order[:600]], self.labels[order[:600]])
        self.images = images.view(-1, 8, 8).roll(1, 2).reshape(-1, 64)
        self.rest = order[600:].tolist()

    @staticmethod
    def _pretrained(images: Tensor, labels: Tensor) -> Net:
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        drawn = torch.Generator().manual_seed(0)
        for _ in range(60):
            for batch in torch.randperm(len(images), generator=drawn).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[batch]).outputs, labels[batch]).backward()
                optimizer.step()
        return net

    def losses(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        chosen = list(rows)
        logits = model(self.images[chosen]).outputs
        return nn.functional.cross_entropy(logits, self.labels[chosen], reduction="none")

    def accuracy(self, model: nn.Module, rows: Sequence[int]) -> float:
        chosen = list(rows)
        with torch.no_grad():
            right = model(self.images[chosen]).outputs.argmax(1) == self.labels[chosen]
        return float(right.float().mean())

    def skewed(self, rows: Sequence[int], seed: int) -> list[list[int]]:
        """The rows of each client."""
        drawn = torch.Generator().manual_seed(seed)
        parts: list[list[int]] = [[] for _ in range(CLIENTS)]
        for label in range(LABELS):
            own = [row for row in rows if int(self.labels[row]) == label]
            own = [own[place] for place in torch.randperm(len(own), generator=drawn).tolist()]
            little = int(SKEW * len(own))
            for client in range(CLIENTS):
                count = little if client != label % CLIENTS else len(own) - little * (CLIENTS - 1)
                parts[client] += own[:count]
                own = own[count:]
        return parts

    def adapted(self, rank: int, freeze_a: bool, seed: int) -> nn.Module:
        clients = [{"dataset": f"dat_{number:032x}"} for number in range(CLIENTS)]
        parameters = {"rank": rank, "freeze_a": freeze_a, "clients": clients}
        return adapted(copy.deepcopy(self.base), parameters, seed)

    def federated(
        self,
        clients: Sequence[Sequence[int]],
        *,
        rate: float,
        rounds: int,
        steps: int,
        batch: int,
        seed: int,
        rank: int = 32,
        freeze_a: bool = True,
        sigma: float | None = None,
    ) -> nn.Module:
        """The model after all rounds; with `sigma` by DP-SGD that clips to 2."""
        net = self.adapted(rank, freeze_a, seed)
        settings = TrainingSettings(
            learning_rate=rate, batch_size=batch, optimizer="sgd", schedule="constant", max_grad_norm=0.0
        )
        weights = shares({number: len(rows) for number, rows in enumerate(clients)}, "rows")
        state = trained(net)
        for round_ in range(rounds):
            updates = {}
            for number, rows in enumerate(clients):
                put(net, state)
                own = seed_of(seed, round_, number, "rows")
                noise = None
                if sigma is not None:
                    noise = Noise(sigma, 2.0, batch / len(rows), seed_of(seed, round_, number, "noise"))
                plan = LocalPlan(settings, steps, round_ * steps, rounds * steps, own, batch, noise)
                train_locally(net, rows, self.losses, plan)
                updates[number] = trained(net)
            state = average(updates, weights)
        put(net, state)
        return net.eval()


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters() if value.requires_grad}


def put(net: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name in state:
                value.copy_(state[name])


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_with_skewed_labels_it_is_as_good_as_fedavg_of_both_factors(digits: Digits) -> None:
    """At rank 32, with the best learning rates of {1, 2, 4} and {0.1, 0.2, 0.3} on other seeds."""
    train, test = digits.rest[:600], digits.rest[600:]
    shared: dict[str, Any] = {"rounds": 20, "steps": 10, "batch": 32}
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(10, 16):
        for freeze_a, rate in ((True, 2.0), (False, 0.2)):
            net = digits.federated(digits.skewed(train, seed), rate=rate, freeze_a=freeze_a, seed=seed, **shared)
            found[freeze_a].append(digits.accuracy(net, test))
    figures = {which: (statistics.mean(values), statistics.stdev(values)) for which, values in found.items()}
    assert digits.accuracy(digits.base, test) < 0.6
    assert figures[True][0] >= figures[False][0] - 0.01
    assert figures[True][0] > 0.9


def test_epsilon_one_leaves_much_and_noise_without_end_leaves_chance(digits: Digits) -> None:
    train, test = digits.rest[:900], digits.rest[900:]
    clients = [train[number::CLIENTS] for number in range(CLIENTS)]
    shared: dict[str, Any] = {"rounds": 10, "steps": 5, "batch": 64, "rank": 16}
    sigma = noise_for(1.0, 1e-5, 64 / 300, 50)
    assert spent(sigma, 1e-5, 64 / 300, 50) <= 1.0
    before = digits.accuracy(digits.base, test)
    found = {
        name: [
            digits.accuracy(digits.federated(clients, seed=seed, **{**shared, **changes}), test)
            for seed in range(10, 14)
        ]
        for name, changes in {
            "ffa": {"rate": 1.0, "sigma": sigma},
            "fedavg": {"rate": 0.1, "freeze_a": False, "sigma": sigma},
            "noise": {"rate": 1.0, "sigma": 50.0},
        }.items()
    }
    assert min(found["ffa"]) > before + 0.15  # it learned, and is far from chance
    assert max(found["noise"]) < 2 * CHANCE  # and unlearned what the base model could
    assert statistics.mean(found["ffa"]) > statistics.mean(found["fedavg"])


def auc(inside: Tensor, outside: Tensor) -> float:
    """How often a row that was trained on has a smaller loss than one that was not."""
    pairs = inside[:, None] - outside[None, :]
    return float((pairs < 0).double().mean() + 0.5 * (pairs == 0).double().mean())


def test_the_loss_tells_who_was_trained_on_only_without_privacy(digits: Digits) -> None:
    """50 rows in, 50 out, four times. Their labels are drawn at random, so that memory alone knows them."""
    digits = copy.copy(digits)
    digits.labels = torch.randint(LABELS, digits.labels.shape, generator=torch.Generator().manual_seed(0))
    sigma = noise_for(1.0, 1e-2, 10 / 50, 50)
    found: dict[str, list[float]] = {"private": [], "plain": []}
    for seed in range(4):
        order = torch.randperm(len(digits.rest), generator=torch.Generator().manual_seed(seed)).tolist()
        inside, outside = ([digits.rest[place] for place in order[at : at + 50]] for at in (0, 50))
        runs: dict[str, dict[str, Any]] = {
            "private": {"rate": 1.0, "rounds": 1, "steps": 50, "batch": 10, "sigma": sigma},
            "plain": {"rate": 1.0, "rounds": 1, "steps": 600, "batch": 25},
        }
        for name, changes in runs.items():
            net = digits.federated([inside], seed=seed, rank=16, **changes)
            with torch.no_grad():
                found[name].append(auc(digits.losses(net, inside), digits.losses(net, outside)))
    assert statistics.mean(found["private"]) <= 0.6, found
    assert min(found["plain"]) > 0.7, found
