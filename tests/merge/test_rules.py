"""Rules on blocks: by hand, against PEFT's own functions, and that masks do not depend on how a matrix is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_definitions import drawn
from scipy.stats import chisquare

from artifacts.algebra import SPARE_VECTORS, small_svd_of_rank
from merge import mask_loops, rules, spectral

W = torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64)


def blocks(seed: int = 0, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 7, 11, generator=torch.Generator().manual_seed(seed))


def test_trimming_by_hand() -> None:
    block = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 0.1, 1.0]])
    assert rules.trimmed(block, 0.34).tolist() == [[3.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]
    # both entries of size 1 stand at the border of half
    assert rules.trimmed(block, 0.5).tolist() == [[3.0, -1.0, 0.0], [-2.0, 0.0, 1.0]]
    assert rules.trimmed(block, 0.1).abs().sum() == 0
    assert rules.trimmed(block, 1.0) is block


def test_election_by_hand() -> None:
    X = torch.tensor([[[4.0, 1.0, -1.0]], [[-1.0, 1.0, 1.0]], [[-1.0, 0.0, 0.0]]])
    weights = torch.tensor([1.0, 3.0, 1.0])
    assert rules.elected_sum(X, weights, "total").tolist() == [[4.0, 2.0, 3.0]]
    assert rules.elected_sum(X, weights, "frequency").tolist() == [[-2.0, 2.0, 3.0]]
    # mergekit votes with the weights, and divides by those that agree
    assert rules.elected_mean(X, weights, "total", normalize=True).tolist() == [[4.0, 1.0, 1.0]]
    assert rules.elected_mean(X, weights, "frequency", normalize=False).tolist() == [[-4.0, 4.0, 3.0]]


@pytest.mark.parametrize("election", ["total", "frequency"])
def test_ties_is_pefts(election: rules.Election) -> None:
    from peft.utils.merge_utils import ties

    X, weights = blocks(), W.float()
    ours = rules.elected_sum(torch.stack([rules.trimmed(x, 0.3) for x in X]), weights, election)
    torch.testing.assert_close(ours, ties(list(X), weights, 0.3, election))


def test_magnitude_pruning_is_pefts() -> None:
    from peft.utils.merge_utils import magnitude_prune

    X, weights = blocks(), W.float()
    ours = rules.weighted_sum(torch.stack([rules.trimmed(x, 0.3) for x in X]), weights)
    torch.testing.assert_close(ours, magnitude_prune(list(X), weights, 0.3))


def test_the_two_definitions_of_ties_differ() -> None:
    X, weights = blocks(), torch.tensor([1.0, 0.5, 0.3])
    kept = torch.stack([rules.trimmed(x, 0.5) for x in X])
    peft = rules.elected_sum(kept, weights, "total")
    mergekit = rules.elected_mean(kept, weights, "total", normalize=True)
    assert float((peft - mergekit).norm() / mergekit.norm()) > 0.3


class TestCompiledLoops:
    """Float32 blocks take the compiled loops, float64 blocks tensor algebra."""

    X = torch.randn(3, 40, 37, generator=torch.Generator().manual_seed(2))
    # whole numbers: then votes tie, and entries stand at a border
    WHOLE = (2 * X).round()
    WINDOWS = (None, rules.Window(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0, 1.0, float("inf")])))

    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("X", [X, WHOLE])
    def test_they_do_what_the_algebra_does(self, X: torch.Tensor, window: rules.Window | None) -> None:
        def same(one: torch.Tensor, other: torch.Tensor) -> None:
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)

        exact, weights = X.double(), torch.tensor([1.0, 0.5, -0.75], dtype=torch.float64)
        same(rules.weighted_sum(X, weights, window), rules.weighted_sum(exact, weights, window))
        for election in ("total", "frequency"):
            same(rules.elected_sum(X, weights, election, window), rules.elected_sum(exact, weights, election, window))
            for normalize in (True, False):
                ours = rules.elected_mean(X, weights, election, normalize=normalize, window=window)
                same(ours, rules.elected_mean(exact, weights, election, normalize=normalize, window=window))

    def test_a_window_has_its_lower_border_and_not_its_upper(self) -> None:
        X = torch.tensor([[[-2.0, -1.0, 0.5, 1.0, 2.0]]])
        window = rules.Window(torch.tensor([1.0]), torch.tensor([2.0]))
        one = torch.ones(1)
        expected = [[0.0, -1.0, 0.0, 1.0, 0.0]]
        assert rules.weighted_sum(X, one, window).tolist() == expected
        assert rules.weighted_sum(X.double(), one, window).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 5, 7])
def test_equal_blocks_have_no_variance(count: int, dtype: torch.dtype) -> None:
    """Their mean is rounded, though: what that leaves is no difference between them."""
    one = torch.randn(40, 37, generator=torch.Generator().manual_seed(count)).to(dtype)
    equal = one.expand(count, -1, -1).contiguous()
    sizes = torch.full((count,), 0.7, dtype=torch.float64)
    assert float(rules.variance(equal, sizes).abs().max()) == 0
    other = equal.clone()
    other[0] *= 1.001
    exact = (other.double() * sizes.to(dtype).double()[:, None, None]).var(0, unbiased=False)
    torch.testing.assert_close(rules.variance(other, sizes).double(), exact, rtol=2e-3, atol=0)


class TestDropping:
    def test_entries_are_kept_at_the_density_and_rescaled(self) -> None:
        X = torch.ones(400, 300)
        kept = rules.dropped(X, 0.3, seed=5)
        assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.3).item()}
        assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)

    def test_masks_do_not_depend_on_how_the_matrix_is_cut(self) -> None:
        keys = np.array([7, 2**63], np.uint64)
        whole = rules.erased(torch.ones(2, 40, 50), keys, 0, 0, 0.5)
        part = rules.erased(torch.ones(2, 9, 20), keys, 13, 30, 0.5)
        assert torch.equal(part, whole[:, 13:22, 30:])
        exact = rules.erased(torch.ones(2, 9, 20, dtype=torch.float64), keys, 13, 30, 0.5)
        assert torch.equal(exact, part.double())
        assert torch.equal(rules.dropped(torch.ones(40, 50), 0.5, 7), 2 * whole[0])

    def test_seeds_differ(self) -> None:
        X = torch.ones(20, 20)
        assert not torch.equal(rules.dropped(X, 0.5, 1), rules.dropped(X, 0.5, 2))


class TestRandomNumbers:
    def test_they_are_a_hash_of_key_row_and_column(self) -> None:
        """Against whole numbers of Python."""
        keys, row, column = [3, 2**64 - 1], 5, 100
        found = np.empty((2, 4, 6), np.uint32)
        mask_loops.draw(np.array(keys, np.uint64), row, column, found)
        for key, ours in zip(keys, found, strict=True):
            assert ours.tolist() == drawn((row + 4, column + 6), key)[row:, column:].tolist()

    def test_they_are_uniform_and_do_not_depend_on_their_neighbours(self) -> None:
        found = np.empty((3, 512, 512), np.uint32)
        mask_loops.draw(np.array([0, 1, 2**40], np.uint64), 0, 0, found)
        for shift in (0, 8, 16, 24):
            counts = np.bincount((found >> shift & 255).ravel(), minlength=256)
            assert chisquare(counts).pvalue > 1e-4
        centred = found / 2**32 - 0.5
        several = [
            (centred[:, 1:], centred[:, :-1]),
            (centred[:, :, 1:], centred[:, :, :-1]),
            (centred[1:], centred[:-1]),
            (centred[:, :, 64:], centred[:, :, :-64]),
        ]
        for one, other in several:
            # a mean product of independent numbers has the deviation 1/12·√m
            assert abs(float((one * other).mean())) < 4.5 / 12 / one.size**0.5

    @pytest.mark.parametrize("density", [0.1, 0.5])
    def test_what_is_kept_of_a_row_does_not_depend_on_what_is_kept_far_away(self, density: float) -> None:
        found = np.empty((1, 40, 32768), np.uint32)
        mask_loops.draw(np.array([5], np.uint64), 0, 0, found)
        centred = (found < density * 2**32).astype(np.float32) - np.float32(density)
        for lag in (1, 64, 512, 2048, 4096, 8192, 12288, 16384):
            products = centred[..., lag:] * centred[..., :-lag]
            correlation = float(products.mean(dtype=np.float64)) / (density * (1 - density))
            assert abs(correlation) < 4.5 / products.size**0.5, lag

    @pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.999])
    def test_the_share_that_is_kept_is_the_density(self, density: float) -> None:
        kept = rules.erased(torch.ones(2, 700, 700), np.array([1, 2], np.uint64), 0, 0, density)
        deviation = (density * (1 - density) / kept.numel()) ** 0.5
        assert abs(float(kept.double().mean()) - density) < 4.5 * deviation + 1e-9


@pytest.mark.parametrize("rank", [0, 1, 5, 11])
def test_an_svd_of_known_rank_is_that_of_the_matrix(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(40, rank, dtype=torch.float64, generator=generator) for _ in range(2))
    core = left * torch.logspace(0, -4, rank, dtype=torch.float64) @ right.T
    U, S, V = small_svd_of_rank(core, rank)
    assert len(S) == rank + SPARE_VECTORS
    exact = torch.linalg.svdvals(core)
    torch.testing.assert_close(S, exact[: len(S)], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(U * S @ V.T, core, rtol=0, atol=1e-11)
    there = exact[: len(S)] > 1e-9
    torch.testing.assert_close(U[:, there].T @ U[:, there], torch.eye(rank, dtype=torch.float64))


class TestPolarFactor:
    def test_it_is_orthonormal_and_nearest(self) -> None:
        X = blocks()[0].double().T
        polar = spectral.polar(X, 1e-6)[0]
        torch.testing.assert_close(polar.T @ polar, torch.eye(7, dtype=torch.float64))
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        torch.testing.assert_close(polar, U @ Vh)

    def test_a_small_direction_counts_as_much_as_a_large_one(self) -> None:
        """Of its square nothing is left beside that of the large one."""
        generator = torch.Generator().manual_seed(0)
        P, Q = (torch.linalg.qr(torch.randn(d, 2, dtype=torch.float64, generator=generator)).Q for d in (9, 4))
        X = P * torch.tensor([1.0, 1e-10], dtype=torch.float64) @ Q.T
        torch.testing.assert_close(spectral.polar(X, 1e-14)[0], P @ Q.T, rtol=0, atol=1e-5)

    def test_directions_that_are_not_there_stay_out(self) -> None:
        X = blocks()[0].double().T[:, :3]
        doubled = torch.cat([X, X], 1)
        polar = spectral.polar(doubled, 1e-6)[0]
        singular = torch.linalg.svdvals(polar)
        torch.testing.assert_close(singular, torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64), atol=1e-6, rtol=0)
