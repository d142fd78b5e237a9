"""The budget and the running means of growing ranks, and rows that join an optimiser late: exact figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.learning_rates import rate_at
from train.options.increlora import IncreloraOptions
from train.rank_growth import GrowthPlan, Importance
from train.row_groups import RestartSchedule, RowGroups, Rows
from train.settings import TrainingSettings

# The authors' recipe of MRPC at rank 8, whose code ends at 592.
MRPC = GrowthPlan(layers=72, initial_rank=1, total_rank=576, increment=4, layers_per_round=10, interval=100, wait=100)


def test_the_running_means_of_a_sequence_by_hand() -> None:
    found = Importance(0.85, 0.85)
    means, deviations = [], []
    for score in (1.0, 2.0, 4.0):
        found.update({"a": score})
        means.append(found.mean["a"])
        deviations.append(found.deviation["a"])
    assert means == pytest.approx([0.15, 0.4275, 0.963375], abs=1e-12)
    assert deviations == pytest.approx([0.1275, 0.344250, 0.748106], abs=1e-6)
    assert found.of("a") == means[-1] * deviations[-1]
    again = Importance(0.85, 0.85)
    again.load_state(found.state())
    assert again == found


def test_equal_layers_are_ordered_by_name() -> None:
    found = Importance(0.85, 0.85)
    found.update({"b": 1.0, "c": 2.0, "a": 1.0, "d": 0.0})
    assert found.order(["d", "c", "b", "a"]) == ["c", "a", "b", "d"]


def test_the_budget_is_met_exactly_where_whole_rounds_would_pass_it() -> None:
    assert MRPC.rounds == 13
    assert (MRPC.first, MRPC.last) == (200, 1400)
    names = [f"{number:02d}" for number in range(72)]
    ranks, largest = dict.fromkeys(names, 1), dict.fromkeys(names, MRPC.largest_rank(768, 768))
    generator = torch.Generator().manual_seed(0)
    totals, rounds = [], []
    for step in range(2000):
        if MRPC.grows_at(step) and totals[-1] < MRPC.total_rank:
            order = [names[at] for at in torch.randperm(72, generator=generator)]
            gains = MRPC.shares(order, ranks, largest)
            assert list(gains) == order[: len(gains)]
            ranks = {name: rank + gains.get(name, 0) for name, rank in ranks.items()}
            rounds.append((step, len(gains)))
        totals.append(sum(ranks.values()))
    assert totals == sorted(totals)
    assert totals[-1] == 576
    assert min(ranks.values()) >= 1
    assert rounds == [(step, 10) for step in range(200, 1400, 100)] + [(1400, 6)]


def test_a_round_gives_the_rest_of_the_budget_and_passes_by_what_is_full() -> None:
    plan = GrowthPlan(3, 1, 8, increment=2, layers_per_round=3, interval=1, wait=1)
    full = {"a": 1, "b": 9, "c": 9}
    assert plan.shares(["a", "b", "c"], {"a": 1, "b": 1, "c": 1}, full) == {"b": 2, "c": 2}
    assert plan.shares(["c", "b", "a"], {"a": 1, "b": 3, "c": 3}, full) == {"c": 1}
    assert plan.shares(["c", "b", "a"], {"a": 1, "b": 3, "c": 4}, full) == {}


def test_scores_are_due_before_a_round_only() -> None:
    plan = GrowthPlan(2, 1, 10, increment=1, layers_per_round=1, interval=5, wait=5)
    assert [step for step in range(20) if plan.grows_at(step)] == [10, 15]
    assert [step for step in range(20) if plan.scores_at(step, 2)] == [9, 10, 14, 15, 19]
    assert all(plan.scores_at(step, None) for step in range(20))


def test_a_plan_without_an_interval_grows_during_half_of_the_training() -> None:
    options = IncreloraOptions(target_rank=8, layers_per_round=10)
    plan = options.plan(72, TrainingSettings(), 1000)
    assert (plan.rounds, plan.increment, plan.interval, plan.last) == (13, 4, 35, 490)
    warm = options.plan(72, TrainingSettings(warmup_steps=100), 2000)
    assert (warm.interval, warm.wait, warm.first) == (100, 100, 200)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rates_are_those_of_the_loop(schedule: str) -> None:
    from transformers import get_scheduler

    from train.loop import SCHEDULES

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    usual = get_scheduler(SCHEDULES[schedule], optimizer, num_warmup_steps=4, num_training_steps=20)
    for step in range(21):
        assert rate_at(schedule, step, 20, 4) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        usual.step()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rows_that_join_late_train_as_parameters_of_their_own(optimizer: str) -> None:
    """Bit for bit: with moments and a schedule that begin when they join."""
    joins, total = 4, 12
    settings = TrainingSettings(
        learning_rate=0.1, warmup_steps=2, weight_decay=0.1, schedule="linear", optimizer=optimizer
    )
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 3))
    early, late = (nn.Parameter(part.detach().clone()) for part in (whole[:2], whole[2:5]))
    untouched = whole[5].detach().clone()
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    apart = {0: kind([early], lr=0.1, weight_decay=0.1), joins: kind([late], lr=0.1, weight_decay=0.1)}

    groups = RowGroups(settings, [Rows(whole, 0, 2)], [])
    schedule = RestartSchedule(groups.optimizer, settings, total)
    rates: list[list[float]] = []
    for step in range(total):
        target = torch.randn(6, 3)
        (whole - target).square().sum().backward()
        for parameter, rows in ((early, slice(0, 2)), (late, slice(2, 5))):
            parameter.grad = 2 * (parameter.detach() - target[rows])
        groups.attach()
        if step == joins:
            groups.join(step, [Rows(whole, 2, 5)])
        rates.append([group["lr"] for group in groups.optimizer.param_groups])
        groups.optimizer.step()
        groups.detach()
        schedule.step()
        whole.grad = None
        for start, other in apart.items():
            if step > start or step == start == 0:
                other.param_groups[0]["lr"] = 0.1 * rate_at("linear", step - start, total - start, 2)
                other.step()
        assert torch.equal(whole[:2], early), step
        assert torch.equal(whole[2:5], late), step
    assert torch.equal(whole[5], untouched)
    assert not torch.equal(late, whole.new_zeros(3, 3))
    first, second = [rate[0] for rate in rates], [rate[1] for rate in rates[joins:]]
    assert (first[0], first[2], max(first)) == (0.0, pytest.approx(0.1), pytest.approx(0.1))
    assert (second[0], second[2], max(second)) == (0.0, pytest.approx(0.1), pytest.approx(0.1))
    assert [group["lr"] for group in groups.optimizer.param_groups] == [0.0, 0.0]  # at the end of the training
