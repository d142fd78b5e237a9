"""The streaming truncated SVD against the best one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge import row_svd, strips
from merge.memory import Room


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


def put(block: Tensor, rows: Tensor) -> None:
    """In a block as `row_svd` takes it."""
    if block.dim() == 2:
        block.copy_(rows)
    else:
        strips.write(block, rows)


def test_a_matrix_without_room_comes_anew_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    M = torch.randn(1400, 900, generator=torch.Generator().manual_seed(0))
    calls = 0

    def fill(row: int, out: Tensor) -> None:
        nonlocal calls
        calls += 1
        put(out, M[row : row + row_svd.BLOCK_ROWS])

    kept = row_svd.row_svd(fill, (1400, 900), 10, M[:4].T, 3)
    looked_at = 2
    once = calls - looked_at
    assert once == -(-1400 // row_svd.BLOCK_ROWS)
    monkeypatch.setattr(row_svd, "ROOM", Room(M.numel() * 4 - 1))
    anew = row_svd.row_svd(fill, (1400, 900), 10, M[:4].T, 3)
    assert calls == 4 * once + 2 * looked_at
    assert torch.equal(anew.A, kept.A)
    assert torch.equal(anew.B, kept.B)
    assert anew.truncation_error == kept.truncation_error


@pytest.mark.parametrize("rank", [10, 60])
def test_passes_come_closer_to_the_best(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(1400, 900, generator=generator) @ torch.diag(torch.logspace(0, -2, 900))

    def fill(row: int, out: Tensor) -> None:
        put(out, M[row : row + row_svd.BLOCK_ROWS])

    best = float((M - truncated(M, rank)).norm() / M.norm())
    start = torch.randn(900, 4, generator=generator)
    errors = []
    for passes in (1, 2, 12):
        low = row_svd.row_svd(fill, (1400, 900), rank, start, passes)
        actual = float((M - low.B @ low.A).norm() / M.norm())
        assert low.truncation_error == pytest.approx(actual, rel=1e-3)
        errors.append(actual)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("found_in", [range(1400), range(1024, 1088)])
def test_what_nothing_pointed_to_is_found_in_the_rows(found_in: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are looked at first, where noise would hide them from one pass with random directions."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(1400, 900, generator=generator)
    strong = torch.randn(len(found_in), 8, generator=generator) @ torch.randn(8, 900, generator=generator)
    M[found_in.start : found_in.stop] += 0.4 * (1400 / len(found_in)) ** 0.5 * strong

    def error(wanted: int) -> float:
        monkeypatch.setattr(row_svd, "LOOK", wanted)
        low = row_svd.row_svd(fill, (1400, 900), 8, torch.zeros(900, 12), 1)
        return float((M - low.B @ low.A).norm() / (M - truncated(M, 8)).norm())

    def fill(row: int, out: Tensor) -> None:
        put(out, M[row : row + row_svd.BLOCK_ROWS])

    assert error(16) < 1.01
    assert error(1000) > 1.03


@pytest.mark.parametrize("exponent", [-60, -80, -140])
def test_a_matrix_whose_squares_vanish_is_truncated_as_any_other(exponent: int) -> None:
    M = torch.randn(1400, 900, generator=torch.Generator().manual_seed(0))
    small = 0.0

    def fill(row: int, out: Tensor) -> None:
        put(out, M[row : row + row_svd.BLOCK_ROWS] * small)

    found = []
    for small in (1.0, 2.0**exponent):
        low = row_svd.row_svd(fill, (1400, 900), 10, M[:4].T, 1)
        found.append((low.B.double() @ low.A.double() / small, low.truncation_error))
    # the last is no whole number of the smallest float32
    assert near(found[1][0], found[0][0], 1e-6 if exponent > -126 else 1e-2)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    small = 0.0
    nothing = row_svd.row_svd(fill, (1400, 900), 10, M[:4].T, 1)
    assert not (nothing.A.any() or nothing.B.any())
    assert nothing.truncation_error == 0


@pytest.mark.parametrize("known", [0, 3, 40])
@pytest.mark.parametrize("least", [1e-6, 1.0])
def test_one_pass_is_enough_for_a_matrix_of_a_small_rank(known: int, least: float) -> None:
    """Beyond its rank, what the matrix makes of the directions is rounding."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, 9, generator=generator)).Q for d in (1400, 900))
    M = (U * torch.logspace(0, torch.tensor(least).log10().item(), 9)) @ V.T

    def fill(row: int, out: Tensor) -> None:
        put(out, M[row : row + row_svd.BLOCK_ROWS])

    start = torch.cat([V[:, :known], torch.zeros(900, max(known - 9, 0))], 1)
    low = row_svd.row_svd(fill, (1400, 900), 12, start, 1)
    # what the other directions hide, by rounding, of one that is nearly theirs
    assert near(low.B @ low.A, M, 3e-5 if known else 1e-3)
    assert low.truncation_error < 2e-3
    assert bool(low.A.isfinite().all())
    assert bool(low.B.isfinite().all())
