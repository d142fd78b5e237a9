"""PEFT's factor-wise combinations: parity with stock PEFT, and where they are wrong, by how much."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_definitions import drawn
from torch import Tensor, nn

from artifacts.errors import MergeRefused
from merge import rules

Write = Callable[..., Path]
PATH = "proj"
WEIGHTS = [1.0, 0.5]


def factors(seed: int, r: int = 4, d_in: int = 24, d_out: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x)
        return result


def by_peft(sources: list[Path], kind: str, weights: list[float], **changes: Any) -> Tensor:
    """ΔW of stock PEFT's add_weighted_adapter."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(Layer(), sources[0], adapter_name="a0")
        for number, source in enumerate(sources[1:], start=1):
            model.load_adapter(source, f"a{number}")
        names = [f"a{number}" for number in range(len(sources))]
        model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **changes)
    layer = model.base_model.model.proj
    delta: Tensor = layer.get_delta_weight("merged").detach().double()
    return delta


@pytest.fixture
def sources(write_adapter: Write) -> list[Path]:
    return [write_adapter(f"a{i}", {PATH: factors(i)}, lora_alpha=alpha) for i, alpha in enumerate((8, 2))]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("linear_factor", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
    ],
)
@pytest.mark.parametrize("weights", [[1.0, 0.5], [1.0, -0.7]])
def test_parity_with_peft(
    method: str, changes: dict[str, Any], weights: list[float], sources: list[Path], merge: Any
) -> None:
    kind = "linear" if method == "linear_factor" else method
    result, report = merge(sources, method, weights=weights, **changes)
    torch.testing.assert_close(result[PATH], by_peft(sources, kind, weights, **changes), rtol=1e-5, atol=1e-5)
    assert report.rank == 4


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_parity_where_peft_is_exact(kind: str, sources: list[Path], merge: Any) -> None:
    result, _ = merge(sources, kind, weights=[1.0, -0.7], **({"rank": 3} if kind == "svd" else {}))
    expected = by_peft(sources, kind, [1.0, -0.7], **({"svd_rank": 3} if kind == "svd" else {}))
    torch.testing.assert_close(result[PATH], expected, rtol=1e-4, atol=1e-4)


def masks(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.from_numpy(drawn(shape, seed) / 2**32 < 0.6).float()


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_parity_with_peft_where_the_same_entries_are_dropped(
    kind: str, election: str, sources: list[Path], merge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds are 1 and 2 for the A's and for the deltas, 11 and 12 for the B's, whose masks are of the transpose."""
    from peft.utils import merge_utils

    monkeypatch.setattr(rules, "seeds", lambda stack, seed: [1 + owner + 10 * (seed > 0) for owner, _ in stack.members])
    drawn = {(4, 24): [1, 2], (16, 4): [11, 12], (16, 24): [1, 2]}

    def dropped(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        seed = drawn[tuple(tensor.shape)].pop(0)
        mask = masks((4, 16), seed).T if tensor.shape == (16, 4) else masks(tuple(tensor.shape), seed)
        return tensor * mask / density

    monkeypatch.setattr(merge_utils, "random_pruning", dropped)
    chosen = {"majority_sign_method": election} if "ties" in kind else {}
    rank = {"rank": 3} if kind.endswith("svd") else {}
    result, _ = merge(sources, kind, weights=[1.0, -0.7], density=0.6, **chosen, **rank)
    expected = by_peft(sources, kind, [1.0, -0.7], density=0.6, **chosen, **({"svd_rank": 3} if rank else {}))
    torch.testing.assert_close(result[PATH], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("cat", {}),
        ("svd", {}),
        ("ties_svd", {"density": 0.4}),
        ("ties_svd", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("magnitude_prune_svd", {"density": 0.4}),
    ],
)
def test_parity_with_peft_at_unequal_ranks(
    kind: str, changes: dict[str, Any], write_adapter: Write, merge: Any
) -> None:
    unequal = [write_adapter(f"r{r}", {PATH: factors(r, r)}, lora_alpha=8 - r) for r in (2, 5)]
    rank = {} if kind == "cat" else {"rank": 3}
    result, _ = merge(unequal, kind, weights=[1.0, -0.7], **changes, **rank)
    expected = by_peft(unequal, kind, [1.0, -0.7], **changes, **({"svd_rank": 3} if rank else {}))
    torch.testing.assert_close(result[PATH], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [WEIGHTS, [-1.0, 0.5]])
def test_cross_terms_are_measured_and_warned_of(
    weights: list[float], sources: list[Path], merge: Any, dense_delta: Any
) -> None:
    result, report = merge(sources, "linear_factor", weights=weights)
    exact = weights[0] * dense_delta(sources[0], PATH) + weights[1] * dense_delta(sources[1], PATH)
    error = float((result[PATH] - exact).norm() / exact.norm())
    assert error > 0.3
    assert report.modules[0].figures["cross_term_error"] == pytest.approx(error, rel=1e-4)
    assert report.modules[0].relative_error == pytest.approx(error, rel=1e-4)
    assert report.totals()["figures"]["cross_term_error"] == pytest.approx(error, rel=1e-4)
    assert any(warning.startswith("cross_terms: in 1 of 1") for warning in report.warnings)


def test_rank_stabilised_adapters_come_out_too_large_of_peft(
    write_adapter: Write, merge: Any, dense_delta: Any
) -> None:
    """PEFT 0.21.2 copies use_rslora to the result, whose scaling is then √r instead of 1; ours is not."""
    rslora = [write_adapter(f"rs{i}", {PATH: factors(i)}, use_rslora=True) for i in range(2)]
    exact = dense_delta(rslora[0], PATH) + 0.5 * dense_delta(rslora[1], PATH)
    for method, kind, rank in (("linear_factor", "linear", 4), ("cat", "cat", 8), ("ties", "ties", 4)):
        changes = {"density": 0.5} if method == "ties" else {}
        result, _ = merge(rslora, method, weights=WEIGHTS, **changes)
        theirs = by_peft(rslora, kind, WEIGHTS, **changes)
        torch.testing.assert_close(theirs, rank**0.5 * result[PATH], rtol=1e-4, atol=1e-4)
        if method == "cat":
            torch.testing.assert_close(result[PATH], exact, rtol=1e-5, atol=1e-5)


class TestUnequalRanks:
    def test_are_padded_and_said_to_be(self, write_adapter: Write, merge: Any) -> None:
        (A, B), (C, D) = factors(1, 4), factors(2, 2)
        unequal = [write_adapter("four", {PATH: (A, B)}), write_adapter("two", {PATH: (C, D)})]
        pad_C, pad_D = torch.cat([C, torch.zeros(2, 24)]), torch.cat([D, torch.zeros(16, 2)], 1)
        padded = [unequal[0], write_adapter("padded", {PATH: (pad_C, pad_D)})]
        for method in ("linear_factor", "dare_linear"):
            changes = {"density": 1.0} if method == "dare_linear" else {}
            result, report = merge(unequal, method, **changes)
            expected, _ = merge(padded, method, **changes)
            torch.testing.assert_close(result[PATH], expected[PATH])
            assert report.rank == 4
            assert any(warning.startswith("ranks_padded: in 1 of 1") for warning in report.warnings)

    def test_are_refused_on_request(self, write_adapter: Write, merge: Any) -> None:
        unequal = [write_adapter(f"r{r}", {PATH: factors(r, r)}) for r in (2, 4)]
        with pytest.raises(MergeRefused, match=r"ranks differ in 1 modules: proj") as caught:
            merge(unequal, "ties", unequal_ranks="error")
        assert caught.value.errors[0].pointer == "/parameters/unequal_ranks"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_masks_of_a_and_b_are_seeded(method: str, sources: list[Path], merge: Any) -> None:
    one, same, other = (merge(sources, method, seed=seed)[0][PATH] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_dare_averages_to_the_sum_of_factors(stack_of: Any, run_method: Any) -> None:
    """Masks of A and of B are independent, so that the expected product is the product of the sums."""
    stack = stack_of([(*factors(i), 1.0) for i in range(2)])
    draws = [run_method("dare_linear", stack, density=0.8, seed=seed) for seed in range(300)]
    expected = run_method("linear_factor", stack)
    assert float((sum(draws) / 300 - expected).norm() / expected.norm()) < 0.08
