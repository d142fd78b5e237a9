"""Which rows a step takes: the same ones whatever the number of ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from train.batches import Batches, share


@given(rows=st.integers(1, 60), size=st.integers(1, 16), ranks=st.integers(1, 5), epoch=st.integers(0, 3))
def test_the_shares_of_all_ranks_are_the_batch_of_one(rows: int, size: int, ranks: int, epoch: int) -> None:
    alone = Batches(rows, size, seed=7)
    together = [Batches(rows, size, 7, rank, ranks) for rank in range(ranks)]
    for batches in (alone, *together):
        batches.epoch = epoch
    expected = list(alone)
    assert len(expected) == len(alone) == len(together[0])
    assert sorted(row for batch in expected for row in batch) == list(range(rows))
    shares = [list(batches) for batches in together]
    assert [[row for part in shares for row in part[number]] for number in range(len(alone))] == expected
    for number in range(len(alone)):
        lengths = {len(part[number]) for part in shares}
        assert max(lengths) - min(lengths) <= 1


def test_every_epoch_has_an_order_of_its_own_and_every_seed() -> None:
    batches = Batches(20, 20, seed=1)
    first = list(batches)
    assert list(batches) == first
    batches.epoch = 1
    second = list(batches)
    assert second != first
    assert list(Batches(20, 20, seed=2)) == second, "seed and epoch are added, as accelerate does"


def test_a_share_may_be_empty() -> None:
    assert [share([1, 2], rank, 3) for rank in range(3)] == [[], [1], [2]]
