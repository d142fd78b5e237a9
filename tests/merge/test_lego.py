"""The oracles of LoRA-LEGO: hand-made fixture, exact oracles 1 to 9, behavioural B1 and B4."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from artifacts.algebra import core_svd, delta_products, gram, squared_norm
from merge.catalog import parse_parameters
from merge.kmeans import gram_kmeans, sklearn_tolerance
from merge.methods import lego
from merge.options import LegoOptions
from merge.stack import Stack

Write = Callable[..., Path]
Merge = Callable[..., Any]

EXACT = 2e-6  # float32 factors
PATH = "layers.0.proj"


def options(**changes: Any) -> LegoOptions:
    parsed = parse_parameters("lego", changes)
    assert isinstance(parsed, LegoOptions)
    return parsed


def stack_of(*adapters: tuple[Tensor, Tensor], weights: list[float] | None = None) -> Stack:
    """A float64 stack of adapters with scaling 1, in the order of contents."""
    owners = [i for i, (A, _) in enumerate(adapters) for _ in range(A.shape[0])]
    unit_weights = [(weights or [1.0] * len(adapters))[i] for i in owners]
    return Stack(
        torch.cat([A for A, _ in adapters]).double(),
        torch.cat([B for _, B in adapters], 1).double(),
        torch.tensor(owners),
        torch.tensor(unit_weights, dtype=torch.float64),
        torch.tensor([p for A, _ in adapters for p in range(A.shape[0])]),
        torch.ones(len(owners), dtype=torch.float64),
    ).ordered()


def delta(stack: Stack, rank: int, **changes: Any) -> Tensor:
    merged = lego.merge(stack, options(rank=rank, **changes), rank)
    return merged.B @ merged.A


def random_factors(seed: int, r: int = 4, d_in: int = 48, d_out: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


HAND = (
    (torch.tensor([[4.0, 0], [0, 1]]), torch.tensor([[2.0, 3]])),
    (torch.tensor([[0.0, 3], [2, 0]]), torch.tensor([[1.0, 4]])),
)


@pytest.mark.parametrize(
    ("k", "changes", "expected"),
    [
        (2, {}, [[16.0, 9.0]]),
        (2, {"parameter_reweight": False}, [[9.0, 4.0]]),
        (1, {}, [[10.39447, 6.92965]]),
        (1, {"parameter_reweight": False}, [[5.303301, 3.535534]]),
        (4, {"output_reweight": False}, [[16.0, 6.0]]),
        (4, {"output_reweight": False, "parameter_reweight": False}, [[16.0, 6.0]]),
        (4, {}, [[16 / math.sqrt(2), 6 / math.sqrt(2)]]),
    ],
)
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_the_hand_made_fixture(k: int, changes: dict[str, Any], expected: list[list[float]], preset: str) -> None:
    result = delta(stack_of(*HAND), k, preset=preset, **changes)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_factors_of_the_fixture() -> None:
    merged = lego.merge(stack_of(*HAND), options(rank=2), 2)
    assert merged.clusters is not None
    assert merged.clusters.largest_factor == pytest.approx(1.5, abs=1e-12)
    assert sorted(merged.clusters.sizes) == [2, 2]


class TestOracle1OneAdapter:
    def test_alone_it_comes_back(self, write_adapter: Write, merge: Merge, dense_delta: Any) -> None:
        source = write_adapter("one", {PATH: random_factors(1)}, lora_alpha=7)
        result, report = merge([source], "lego", rank=4)
        assert relative(result[PATH], dense_delta(source, PATH)) < EXACT
        assert report.totals()["relative_error"] < 1e-6

    def test_identical_copies(self) -> None:
        A, B = random_factors(2)
        merged = lego.merge(stack_of((A, B), (A, B), (A, B)), options(rank=4), 4)
        assert relative(merged.B @ merged.A, B.double() @ A.double()) < 1e-12
        assert merged.clusters is not None
        assert merged.clusters.largest_factor == pytest.approx(1.0, abs=1e-12)

    def test_rank_permuted_copies_where_averaging_factors_fails(self) -> None:
        A, B = random_factors(3)
        orders = [torch.randperm(4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        copies = [(A[order], B[:, order]) for order in orders]
        truth = B.double() @ A.double()
        assert relative(delta(stack_of(*copies), 4), truth) < 1e-12
        mean_A, mean_B = (torch.stack([copy[side] for copy in copies]).mean(0).double() for side in (0, 1))
        assert relative(mean_B @ mean_A, truth) > 0.3


class TestOracle2FullRank:
    def test_without_output_reweighting_it_is_the_sum(
        self, write_adapter: Write, merge: Merge, dense_delta: Any
    ) -> None:
        first = write_adapter("first", {PATH: random_factors(4, r=3)}, lora_alpha=6)
        second = write_adapter("second", {PATH: random_factors(5, r=5)}, use_rslora=True, lora_alpha=2)
        exact = dense_delta(first, PATH) + dense_delta(second, PATH)
        result, report = merge([first, second], "lego", rank=8, output_reweight=False)
        assert relative(result[PATH], exact) < EXACT
        assert report.totals()["relative_error"] == 0.0
        scaled, _ = merge([first, second], "lego", rank=8)
        assert relative(scaled[PATH], exact * math.sqrt(4 / 8)) < EXACT
        same_as_cat, _ = merge([first, second], "cat")
        assert relative(same_as_cat[PATH], exact) < EXACT

    def test_the_reference_rank_may_be_given(self) -> None:
        stack = stack_of(random_factors(6), random_factors(7))
        assert relative(delta(stack, 8, reference_rank=2), delta(stack, 8, output_reweight=False) / 2) < 1e-12


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11), norm=st.sampled_from(["inf", "l2"]))
def test_oracle_3_factors_never_shrink(seed: int, k: int, norm: str) -> None:
    stack = stack_of(*(random_factors(seed + i, d_in=9, d_out=7) for i in range(3)))
    merged = lego.merge(stack, options(rank=k, parameter_reweight=norm, reweight_cap=None), k)
    plain = lego.merge(stack, options(rank=k, parameter_reweight=False), k)
    factors = merged.A.norm(dim=1) / plain.A.norm(dim=1)
    assert float(factors.min()) >= 1 - 1e-12


def test_oracle_4_scaling_is_part_of_the_adapter(write_adapter: Write, merge: Merge) -> None:
    A, B = random_factors(8)
    s = 2.5
    scaled = write_adapter("scaled", {PATH: (A, B)}, lora_alpha=s * 4)
    folded = write_adapter("folded", {PATH: (A * math.sqrt(s), B * math.sqrt(s))})
    other = write_adapter("other", {PATH: random_factors(9)})
    by_scaling, _ = merge([scaled, other], "lego", rank=4)
    by_factors, _ = merge([folded, other], "lego", rank=4)
    assert relative(by_scaling[PATH], by_factors[PATH]) < 1e-6


class TestOracle6Signs:
    def flipped(self) -> tuple[Stack, Tensor]:
        A, B = random_factors(10)
        flip = torch.tensor([1.0, -1, 1, -1])
        return stack_of((A, B), (A * flip[:, None], B * flip)), B.double() @ A.double()

    @pytest.mark.parametrize("alignment", ["cluster", "canonical"])
    def test_alignment_restores_the_adapter(self, alignment: str) -> None:
        stack, truth = self.flipped()
        assert relative(delta(stack, 4, sign_alignment=alignment), truth) < 1e-12

    def test_the_paper_preset_does_not(self) -> None:
        stack, truth = self.flipped()
        assert relative(delta(stack, 4, preset="paper"), truth) > 0.2


class TestOracle7Order:
    def test_of_adapters(self, write_adapter: Write, merge: Merge) -> None:
        sources = [write_adapter(f"a{i}", {PATH: random_factors(20 + i)}) for i in range(3)]
        forward, _ = merge(sources, "lego", rank=5, weights=[1, 2, 3])
        backward, _ = merge(sources[::-1], "lego", rank=5, weights=[3, 2, 1])
        assert torch.equal(forward[PATH], backward[PATH])

    def test_of_components(self, write_adapter: Write, merge: Merge) -> None:
        A, B = random_factors(30, r=6)
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        other = write_adapter("other", {PATH: random_factors(31)})
        plain, _ = merge([write_adapter("plain", {PATH: (A, B)}), other], "lego", rank=5)
        permuted, _ = merge([write_adapter("permuted", {PATH: (A[order], B[:, order])}), other], "lego", rank=5)
        assert torch.equal(plain[PATH], permuted[PATH])

    def test_components_that_agree_where_they_are_sampled(self) -> None:
        A, B = random_factors(32, r=4, d_in=64)
        A = A[:1].repeat(4, 1)
        B = B[:, :1].repeat(1, 4)
        A[:, 5] = torch.tensor([3.0, 1.0, 2.0, 0.0])
        order = torch.tensor([2, 0, 3, 1])
        one, two = stack_of((A, B)), stack_of((A[order], B[:, order]))
        assert torch.equal(one.A, two.A)
        assert one.A[:, 5].tolist() == sorted(one.A[:, 5].tolist())


class TestOracle8NotAFunctionOfDelta:
    def rotated(self) -> tuple[Stack, Stack, Tensor]:
        A, B = (factor.double() for factor in random_factors(40))
        R = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
        other = random_factors(41)
        first, second = stack_of((A, B), other), stack_of((R.T @ A, B @ R), other)
        assert relative(B @ R @ R.T @ A, B @ A) < 1e-12
        return first, second, B @ A

    def test_a_rotation_of_the_factors_changes_the_result(self) -> None:
        first, second, _ = self.rotated()
        assert relative(delta(first, 4), delta(second, 4)) > 0.1

    def test_unless_factors_are_canonical(self) -> None:
        first, second, _ = self.rotated()
        assert relative(delta(first, 4, canonicalize="svd"), delta(second, 4, canonicalize="svd")) < 1e-6

    def test_balanced_is_invariant_to_the_scale_of_components(self) -> None:
        A, B = random_factors(42)
        c = torch.tensor([0.2, 3.0, 1.0, 7.0])
        other = random_factors(43)
        first, second = stack_of((A, B), other), stack_of((A * c[:, None], B / c), other)
        assert relative(delta(first, 4, canonicalize="balanced"), delta(second, 4, canonicalize="balanced")) < 1e-6
        assert relative(delta(first, 4), delta(second, 4)) > 0.1


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_oracle_9_norms_and_singular_values_from_gram_matrices(seed: int) -> None:
    adapters = [random_factors(seed + i, r=3, d_in=20, d_out=16) for i in range(3)]
    stack = stack_of(*adapters)
    total = sum((B.double() @ A.double() for A, B in adapters), torch.zeros(16, 20, dtype=torch.float64))
    products = delta_products(stack.gram_A, stack.gram_B, stack.owners, 3)
    assert float(products.sum()) == pytest.approx(float(total.norm()) ** 2, rel=1e-12)
    assert squared_norm(torch.eye(9).double(), stack.gram_A, stack.gram_B) == pytest.approx(
        float(total.norm()) ** 2, rel=1e-12
    )
    svd = core_svd(stack.A, stack.B, stack.weights, gram(stack.A), gram(stack.B, columns=True))
    torch.testing.assert_close(svd.values, torch.linalg.svdvals(total)[:9], rtol=1e-9, atol=1e-9)


class TestOptions:
    def test_weights_are_ratios(self, write_adapter: Write, merge: Merge) -> None:
        sources = [write_adapter(f"w{i}", {PATH: random_factors(50 + i)}) for i in range(2)]
        small, _ = merge(sources, "lego", weights=[1, 3], rank=4)
        large, _ = merge(sources, "lego", weights=[5, 15], rank=4)
        assert relative(small[PATH], large[PATH]) < 1e-6

    def test_weight_zero_leaves_an_adapter_out(self, write_adapter: Write, merge: Merge, dense_delta: Any) -> None:
        kept = write_adapter("kept", {PATH: random_factors(52)})
        left_out = write_adapter("out", {PATH: random_factors(53)})
        result, _ = merge([kept, left_out], "lego", weights=[2, 0], rank=4)
        assert relative(result[PATH], dense_delta(kept, PATH)) < EXACT

    def test_scale_multiplies_the_delta(self) -> None:
        stack = stack_of(random_factors(54), random_factors(55))
        assert relative(delta(stack, 5, scale=-3.0), delta(stack, 5) * -3) < 1e-12

    def test_weighted_means(self) -> None:
        """Two copies of one direction with weights 1 and 3: the mean is 2.5 times it, the reweighted mean as well."""
        A, B = torch.tensor([[1.0, 0]]), torch.tensor([[1.0]])
        stack = stack_of((A, B), (3 * A, 3 * B), weights=[1, 3])
        result = delta(stack, 1, output_reweight=False)
        torch.testing.assert_close(result, torch.tensor([[6.25, 0]], dtype=torch.float64))

    def test_the_cap_is_reported(self) -> None:
        A, B = torch.tensor([[1.0, 0]]), torch.tensor([[1.0]])
        near = stack_of((A, B), (-A * 0.99, -B * 0.99))
        merged = lego.merge(near, options(rank=1, sign_alignment="none"), 1)
        assert merged.clusters is not None
        assert merged.clusters.capped == 1
        assert merged.clusters.largest_factor == 10.0

    def test_unit_features_ignore_norms(self) -> None:
        """Raw distances group by length, unit features by direction."""
        A = torch.tensor([[1.0, 0], [10, 0], [0, 1], [0, 10]])
        B = torch.tensor([[1.0, 10, 0, 0], [0, 0, 1, 10]])
        merged = lego.merge(stack_of((A, B)), options(rank=2, feature="unit", parameter_reweight=False), 2)
        rows = merged.A / merged.A.norm(dim=1, keepdim=True)
        assert sorted(rows.round(decimals=6).tolist()) == [[0.0, 1.0], [1.0, 0.0]]

    def test_a_smaller_module_is_padded(self, write_adapter: Write, merge: Merge) -> None:
        wide = write_adapter("wide", {PATH: random_factors(56, r=4), "layers.1.proj": random_factors(57, r=4)})
        narrow = write_adapter("narrow", {PATH: random_factors(58, r=4)})
        result, report = merge([wide, narrow], "lego", rank=8, output_reweight=False)
        assert report.rank == 8
        padded = {module.path: module.padded for module in report.modules}
        assert padded == {PATH: 0, "layers.1.proj": 4}
        assert any(warning.startswith("modules_not_in_every_adapter") for warning in report.warnings)
        assert set(result) == {PATH, "layers.1.proj"}

    def test_the_report_measures_the_result(self, write_adapter: Write, merge: Merge, dense_delta: Any) -> None:
        """Energy kept and relative error, from Gram matrices, against dense matrices of a merge that loses a lot."""
        sources = [write_adapter(f"m{i}", {PATH: random_factors(90 + i)}, lora_alpha=3) for i in range(3)]
        weights = [1.0, 2.0, 0.5]
        result, report = merge(sources, "lego", rank=3, weights=weights, scale=1.7)
        exact = 1.7 * sum(w * dense_delta(source, PATH) for w, source in zip(weights, sources, strict=True))
        totals = report.totals()
        assert totals["clusters"]["largest_factor"] > 1.1
        assert totals["relative_error"] == pytest.approx(relative(result[PATH], exact), rel=1e-4)
        assert totals["energy_kept"] == pytest.approx(float(result[PATH].norm() / exact.norm()) ** 2, rel=1e-4)

    def test_the_default_rank_is_twice_the_largest(self, write_adapter: Write, merge: Merge) -> None:
        sources = [write_adapter(f"d{i}", {PATH: random_factors(60 + i, r=3)}) for i in range(4)]
        assert merge(sources, "lego")[1].rank == 6
        assert merge(sources, "lego", rank="r")[1].rank == 3
        assert merge(sources, "lego", k=5)[1].rank == 5

    def test_what_is_asked_of_the_clustering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stack = stack_of(random_factors(1), random_factors(2), weights=[1.0, 3.0])
        asked: dict[str, Any] = {}

        def cluster(gram: Any, weights: Any, k: int, **more: Any) -> Any:
            asked.update(more, weights=weights.tolist(), k=k)
            return gram_kmeans(gram, weights, k, **more)

        monkeypatch.setattr(lego, "gram_kmeans", cluster)
        given = {"n_init": 3, "max_iter": 7, "seed": 5, "refine": False}
        lego.merge(stack, options(**given, tol=1e-3, sign_alignment="cluster"), 4)
        gram = (stack.gram_A + stack.gram_B).numpy()
        assert asked == {
            **given,
            "weights": stack.weights.tolist(),
            "k": 4,
            "signed": True,
            "tolerance": sklearn_tolerance(gram, 48 + 32, 1e-3),
        }
        lego.merge(stack, options(sign_alignment="canonical"), 20)
        assert (asked["signed"], asked["k"]) == (False, 8)

    def test_members_that_cancel_are_left_as_they_are(self) -> None:
        A, B = torch.eye(1, 4), torch.eye(3, 1)
        stack = stack_of((A, B), (-A, -B))
        result = lego.merge(stack, options(sign_alignment="none", canonicalize="none"), 1)
        assert result.clusters is not None
        assert (result.clusters.largest_factor, result.clusters.capped) == (1.0, 0)
        assert result.clusters.sizes == (2,)
        assert result.clusters.mean_cosine == pytest.approx(-1.0)
        assert float((result.B @ result.A).abs().max()) == 0

    @pytest.mark.parametrize("kind", ["svd", "balanced", "none"])
    def test_canonical_components_are_those_of_each_adapter(self, kind: str) -> None:
        adapters = [random_factors(seed, r=rank) for seed, rank in ((1, 3), (2, 4), (3, 2))]
        stack = stack_of(*adapters)
        units = lego._canonicalized(stack, options(canonicalize=kind))
        for owner, (A, B) in enumerate(adapters):
            own = units.owners == owner
            assert relative(units.B[:, own].double() @ units.A[own].double(), B.double() @ A.double()) < 1e-5
            a, b = units.A[own].double(), units.B[:, own].double()
            if kind == "svd":
                for gram in (a @ a.T, b.T @ b):
                    assert relative(gram, torch.diag(gram.diagonal())) < 1e-5
            balanced = torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
            assert balanced is (kind != "none")


class TestBehaviour:
    def test_b1_noisy_permuted_copies(self) -> None:
        generator = torch.Generator().manual_seed(0)
        A, B = torch.randn(8, 256, generator=generator), torch.randn(192, 8, generator=generator)
        truth = B.double() @ A.double()
        copies = []
        for _ in range(4):
            order = torch.randperm(8, generator=generator)
            noisy_A = A + 0.1 * torch.randn(A.shape, generator=generator)
            noisy_B = B + 0.1 * torch.randn(B.shape, generator=generator)
            copies.append((noisy_A[order], noisy_B[:, order]))
        single = relative(copies[0][1].double() @ copies[0][0].double(), truth)
        merged = relative(delta(stack_of(*copies), 8), truth)
        mean_A, mean_B = (torch.stack([copy[side] for copy in copies]).mean(0).double() for side in (0, 1))
        averaged = relative(mean_B @ mean_A, truth)
        assert merged < 0.6 * single
        assert averaged > 3 * single

    def test_b4_only_unrelated_adapters_are_reported_as_unclusterable(self, write_adapter: Write, merge: Merge) -> None:
        unrelated = [write_adapter(f"u{i}", {PATH: random_factors(70 + i, 8, 512, 384)}) for i in range(4)]
        _, report = merge(unrelated, "lego", rank=8)
        assert any(warning.startswith("clusters_not_identifiable") for warning in report.warnings)
        A, B = random_factors(80, 8, 512, 384)
        related = []
        for i in range(4):
            noise_A, noise_B = random_factors(81 + i, 8, 512, 384)
            related.append(write_adapter(f"s{i}", {PATH: (A + 0.5 * noise_A, B + 0.5 * noise_B)}))
        _, report = merge(related, "lego", rank=8)
        assert not any(warning.startswith("clusters_not_identifiable") for warning in report.warnings)
        assert report.totals()["clusters"]["mean_agreement"] == 1.0
