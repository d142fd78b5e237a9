"""The figures of the report and the three zones of the gate, against numbers worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from transfer.gate import ArmScore, GateSettings, judge
from transfer.leaks import count_leaks
from transfer.statistics import auc, bootstrap_lead, squared_mmd, wilson
from transfer.synthetic import SyntheticRow


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(29, 96, 0.2195, 0.4002), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)
    assert found.rate == successes / trials


def test_no_trial_has_no_rate() -> None:
    assert wilson(0, 0) is None


def test_auc_counts_pairs() -> None:
    draws = np.random.default_rng(0)
    high, low = draws.integers(0, 6, 40).astype(float), draws.integers(0, 5, 30).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    assert auc(high.tolist(), low.tolist()) == pytest.approx(np.mean(pairs))
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auc([], [1.0]) is None


def test_mmd_tells_samples_apart() -> None:
    draws = np.random.default_rng(0)
    one, same, other = draws.normal(size=(60, 4)), draws.normal(size=(60, 4)), draws.normal(1.0, 1.0, (60, 4))
    assert squared_mmd(one, one) == pytest.approx(0, abs=1e-12)
    assert squared_mmd(one, other) > 4 * squared_mmd(one, same) > 0
    assert squared_mmd(one * 1000, other * 1000) == pytest.approx(squared_mmd(one, other), rel=1e-9)


def test_mmd_is_the_mean_of_kernels() -> None:
    first, second = np.array([[0.0], [1.0]]), np.array([[3.0]])
    distances = np.array([1.0, 9.0, 4.0])
    k = np.exp(-distances / (2 * np.median(distances)))
    assert squared_mmd(first, second) == pytest.approx((2 + 2 * k[0]) / 4 + 1 - 2 * (k[1] + k[2]) / 2)


def test_the_lead_is_over_the_best_rival() -> None:
    own, rivals = [1.0] * 8 + [0.0] * 2, [[1.0] * 5 + [0.0] * 5, [0.0] * 3 + [1.0] * 7]
    lead, low, high = bootstrap_lead(own, rivals, 2000, 0)
    assert lead == pytest.approx(0.1)
    assert low < lead < high
    assert bootstrap_lead(own, rivals, 2000, 0) == (lead, low, high)
    assert bootstrap_lead(own, [own], 500, 0) == (0.0, 0.0, 0.0)


def arm(rights: int, items: int, start: int = 0) -> ArmScore:
    """Right on `rights` items from `start` on."""
    outcomes = [0.0] * items
    for place in range(rights):
        outcomes[(start + place) % items] = 1.0
    return ArmScore(tuple(outcomes), items, items)


def verdict(own: ArmScore, source: ArmScore, base: ArmScore, **settings: float) -> str:
    return judge({"transferred": own, "source": source, "target_base": base}, GateSettings(**settings), 0).verdict  # type: ignore[arg-type]


def test_the_three_zones() -> None:
    assert verdict(arm(96, 100), arm(96, 100), arm(0, 100)) == "pass"
    assert verdict(arm(50, 100), arm(96, 100), arm(0, 100)) == "fail"
    assert verdict(arm(90, 100, 3), arm(91, 100), arm(0, 100)) == "hold"
    # a weak source does not excuse an adapter that is worse than no adapter
    assert verdict(arm(50, 100), arm(10, 100), arm(90, 100)) == "fail"
    assert verdict(arm(50, 100), arm(52, 100), arm(0, 100), epsilon=0.2) == "pass"


def test_a_rounding_does_not_decide() -> None:
    for items in range(20, 60):
        assert verdict(arm(items, items), arm(items, items), arm(0, items), epsilon=0.0) == "pass"
        assert verdict(arm(0, items), arm(items, items), arm(0, items), epsilon=1.0) == "pass"


def test_few_items_never_decide() -> None:
    assert verdict(arm(19, 19), arm(19, 19), arm(0, 19)) == "hold"
    assert verdict(arm(20, 20), arm(20, 20), arm(0, 20)) == "pass"


def test_negative_flips_are_counted() -> None:
    found = judge({"transferred": arm(30, 40, 4), "source": arm(30, 40), "target_base": arm(0, 40)}, GateSettings(), 0)
    assert found.negative_flips == 4
    assert found.lead == 0
    assert found.to_dict()["items"] == 40


def test_an_arm_tells_no_text() -> None:
    assert set(arm(3, 4).to_dict()) == {"score", "items", "outcomes", "end_rate", "distinct_answers"}


def test_leaks_are_counted() -> None:
    seed = "The patient Johanna Maier was seen on the ward on Monday morning"
    rows = [
        SyntheticRow(0, "who", f"x {seed}"),
        SyntheticRow(1, seed, seed),
        SyntheticRow(2, "mail", "to a.b@example.org"),
        SyntheticRow(3, "card", "4111 1111 1111 1111"),
        SyntheticRow(4, "k", "sk-abcdefghijklmnopqrst"),
        SyntheticRow(5, "fine", "Lima | mugs | 4"),
    ]
    assert count_leaks(rows, [seed]).to_dict() == {
        "seed_overlaps": 1,
        "addresses": 1,
        "long_numbers": 1,
        "keys": 1,
    }
