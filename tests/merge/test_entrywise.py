"""Entrywise methods against dense float64, stock PEFT, and themselves when the matrix is too large to be whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from artifacts.errors import MergeRefused, RankOutOfRange, RequestInvalid
from merge import brackets, row_svd, rows, rules
from merge.brackets import Brackets
from merge.catalog import METHODS, parse_parameters
from merge.methods import entrywise
from merge.methods.entrywise import keep_probabilities

NAMES = sorted(name for name, row in METHODS.items() if row.family == "entrywise")
SAMPLED = {"dare_linear_svd", "dare_ties_svd", "della", "della_linear"}
WEIGHTS = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


def middle(D: Tensor, density: float, gamma: float) -> Tensor:
    order = D.abs().flatten().argsort(descending=True)
    top, kept = int(gamma * D.numel()), int(density * D.numel())
    mask = torch.zeros(D.numel(), dtype=D.dtype)
    mask[order[top : top + kept]] = 1
    return D * mask.view_as(D)


def sce(D: Tensor, density: float) -> Tensor:
    variance = D.var(0, unbiased=False)
    border = variance.flatten().sort(descending=True).values[int(density * variance.numel()) - 1]
    kept = D * (variance >= border)
    weights = kept.square().sum((1, 2))
    shares = weights[:, None, None] / weights.sum() * (kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0))
    return (kept * shares).sum(0) / torch.where(shares.sum(0) == 0, 1.0, shares.sum(0))


def naive(name: str, D: Tensor, w: Tensor) -> Tensor:
    """The definition, on dense deltas (N, d_out, d_in), at density 0.4."""
    trim = torch.stack([rules.trimmed(d, 0.4) for d in D])
    if name == "ties_svd":
        return rules.elected_sum(trim, w, "total")
    if name == "ties_mergekit":
        return rules.elected_mean(trim, w, "total", normalize=True)
    if name == "magnitude_prune_svd":
        return rules.weighted_sum(trim, w)
    if name == "sce":
        return sce(D * w[:, None, None], 0.4)
    kept = torch.stack([middle(d, 0.4, 0.05) for d in D])
    if name == "breadcrumbs":
        return rules.weighted_sum(kept, w)
    return rules.elected_mean(kept, w, "total", normalize=False)


def parameters(name: str, **changes: Any) -> dict[str, Any]:
    return {"density": 0.4, **({"gamma": 0.05} if name.startswith("breadcrumbs") else {}), **changes}


@settings(max_examples=14, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    name=st.sampled_from([name for name in NAMES if name not in SAMPLED]),
    sides=st.tuples(st.integers(5, 45), st.integers(5, 45)),
)
def test_against_dense_matrices(
    seed: int, ranks: list[int], name: str, sides: tuple[int, int], stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    adapters = random_adapters(ranks, *sides, seed=seed)
    w = WEIGHTS[: len(ranks)]
    D = torch.stack([s * B.double() @ A.double() for A, B, s in adapters])
    expected = D[0] * w[0] if name == "sce" and len(ranks) == 1 else naive(name, D, w)
    stack = stack_of(adapters, w.tolist(), torch.float64)
    full = run_method(name, stack, rank=min(sides), **parameters(name))
    assert near(full, expected, 1e-9)
    assert near(run_method(name, stack, rank=2, **parameters(name)), truncated(expected, 2), 1e-6)


@pytest.mark.parametrize("count", [3, 5])
def test_sce_of_equal_adapters_is_the_adapter(count: int, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    """No position varies, so none is erased for varying less than others."""
    adapter = random_adapters([4])[0]
    found = run_method("sce", stack_of([adapter] * count), rank=4, density=0.3)
    assert near(found, adapter[2] * adapter[1].double() @ adapter[0].double(), 1e-5)


class TestAgainstPeft:
    @pytest.mark.parametrize(
        ("name", "changes"),
        [("ties_svd", {}), ("ties_svd", {"majority_sign_method": "frequency"}), ("magnitude_prune_svd", {})],
    )
    def test_parity(self, name: str, changes: dict[str, Any], write_adapter: Callable[..., Path], merge: Any) -> None:
        from peft.utils.merge_utils import magnitude_prune, ties

        generator = torch.Generator().manual_seed(4)
        pairs = [(torch.randn(r, 30, generator=generator), torch.randn(20, r, generator=generator)) for r in (3, 5)]
        sources = [write_adapter(f"p{i}", {"proj": pair}) for i, pair in enumerate(pairs)]
        result, report = merge(sources, name, weights=[1.0, -0.5], density=0.3, rank=6, **changes)
        deltas, w = [B @ A for A, B in pairs], torch.tensor([1.0, -0.5])
        expected = (
            ties(deltas, w, 0.3, changes.get("majority_sign_method", "total"))
            if name == "ties_svd"
            else magnitude_prune(deltas, w, 0.3)
        )
        assert near(result["proj"], truncated(expected.double(), 6))
        lost = float((expected - truncated(expected, 6)).norm() / expected.norm())
        assert report.modules[0].figures["truncation_error"] == pytest.approx(lost, rel=1e-4)

    def test_mergekits_ties_is_another(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        stack = stack_of(random_adapters([4, 4]), [1.0, 0.5])
        peft = run_method("ties_svd", stack, rank=24, density=0.5)
        mergekit = run_method("ties_mergekit", stack, rank=24, density=0.5)
        assert float((peft - mergekit).norm() / mergekit.norm()) > 0.3


class TestALargeMatrix:
    """The same matrix whole, and by brackets and passes."""

    @pytest.mark.parametrize("name", NAMES)
    def test_gives_what_a_whole_one_does(
        self, name: str, stack_of: Any, random_adapters: Any, run_method: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stack = stack_of(random_adapters([3, 4], d_out=70, d_in=50), [1.0, 0.5])
        whole = run_method(name, stack, rank=50, **parameters(name))
        short = run_method(name, stack, rank=4, **parameters(name))
        monkeypatch.setattr(rows, "SORTED", 100)
        monkeypatch.setattr(rows, "SAMPLE", 1 << 10)
        monkeypatch.setattr(rows, "TILE_BYTES", 1)
        monkeypatch.setattr(rows, "TILE_COLUMNS", 16)
        monkeypatch.setattr(row_svd, "WHOLE", 100)
        assert near(run_method(name, stack, rank=50, **parameters(name)), whole)
        assert near(run_method(name, stack, rank=4, passes=32, **parameters(name)), short, 0.02)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_algebra_gives_what_the_loops_do(
        self, name: str, stack_of: Any, random_adapters: Any, run_method: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a device that the loops do not know."""
        monkeypatch.setattr(rows, "SORTED", 100)
        monkeypatch.setattr(rows, "SAMPLE", 1 << 10)
        monkeypatch.setattr(rows, "TILE_BYTES", 1)
        stack = stack_of(random_adapters([3, 4], d_out=70, d_in=50), [1.0, 0.5])
        loops = run_method(name, stack, rank=50, **parameters(name))
        for module in (rows, rules):
            monkeypatch.setattr(module, "compiled", lambda _: False)
        assert near(run_method(name, stack, rank=50, **parameters(name)), loops)

    @pytest.mark.parametrize("measure", [rows.entries, lambda X: X])
    def test_a_bracket_that_misses_is_widened(
        self, measure: rows.Measure, stack_of: Any, random_adapters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 4], d_out=70, d_in=50)))
        counts = [[0, 1, 700, 3499, 3500]] * 2
        exact = rows.largest(deltas, measure, counts)
        values = (deltas.B[1] @ deltas.A[1]).abs().flatten().sort(descending=True).values
        torch.testing.assert_close(torch.tensor(exact[1][1:4]), values[[0, 699, 3498]])
        monkeypatch.setattr(rows, "SORTED", 100)
        monkeypatch.setattr(rows, "SAMPLE", 1 << 10)
        monkeypatch.setattr(rows, "MARGIN", 1e-5)
        passes = 0
        original = Brackets.kth

        def counted(*arguments: Any) -> Any:
            nonlocal passes
            passes += 1
            return original(*arguments)

        monkeypatch.setattr(Brackets, "kth", counted)
        assert rows.largest(deltas, measure, counts) == exact
        assert passes > 1
        assert exact[0][0] == float("inf")
        assert exact[0][4] == 0.0

    def test_a_look_at_a_part_leaves_less_to_hold(
        self, stack_of: Any, random_adapters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of entries and of variances, exactly as without it, where the panels are not filled too."""
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 4, 9], d_out=531, d_in=810)))
        total, held = deltas.entries, []
        monkeypatch.setattr(rows, "SAMPLE", 1 << 12)
        monkeypatch.setattr(rows, "SORTED", total)
        add = Brackets.add_all

        def watched(seen: Brackets, *arguments: Any) -> None:
            add(seen, *arguments)
            held.append(int(seen.count.sum()))

        monkeypatch.setattr(Brackets, "add_all", watched)
        counts = [[1, total // 5, total // 2, total - 1]] * 3
        for measure, wanted in ((rows.entries, counts), (rows.Variance(WEIGHTS), counts[:1])):
            exact = rows.largest(deltas, measure, wanted)
            with monkeypatch.context() as changed:
                changed.setattr(rows, "SORTED", 100)
                assert rows.largest(deltas, measure, wanted) == exact
                first = held.pop()
                changed.setattr(rows, "NARROWED", 100)
                changed.setattr(brackets, "EVERY", 2)
                assert rows.largest(deltas, measure, wanted) == exact
                assert 0 < held.pop() < first / 2
        assert not held

    @pytest.mark.parametrize("sides", [(127, 40), (200, 31)])
    def test_a_module_with_a_short_side_has_no_part_to_look_at(
        self, sides: tuple[int, int], stack_of: Any, random_adapters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such as an embedding of many words in a narrow model."""
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 4, 9], *sides)))
        counts = [[1, deltas.entries // 5, deltas.entries - 1]] * 3
        monkeypatch.setattr(rows, "SAMPLE", 1 << 10)
        for measure, wanted in ((rows.entries, counts), (rows.Variance(WEIGHTS), counts[:1])):
            exact = rows.largest(deltas, measure, wanted)
            with monkeypatch.context() as changed:
                changed.setattr(rows, "SORTED", 100)
                changed.setattr(rows, "NARROWED", 100)
                assert rows.largest(deltas, measure, wanted) == exact

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_bracket_ends_with_the_smallest_of_what_it_holds(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rows, "SAMPLE", 4)
        sample = torch.tensor([[9.0, 3.0, 2.0, 0.0]])
        brackets = Brackets.around([(0, 0.4)], sample, 0.5)
        assert (brackets.low.tolist(), brackets.high.tolist()) == ([2.0], [3.0])
        brackets.add(torch.tensor([[4.0, -3.0, 2.0, 1.0, -2.5]], dtype=dtype))
        assert [brackets.kth([k])[0] for k in range(1, 6)] == [None, 3.0, 2.5, 2.0, None]

    @pytest.mark.parametrize("place", [0, 15, 17])
    def test_a_value_that_is_no_number_is_refused_wherever_it_stands(self, place: int) -> None:
        """In a vector of values, or among the last that fill none."""
        brackets = Brackets.around([(0, 0.4)], torch.arange(float(rows.SAMPLE), 0, -1)[None], 0.5)
        values = torch.full((1, 18), 4.0)
        values[0, 3] = float("inf")
        brackets.add(values)
        values[0, place] = -float("nan")
        with pytest.raises(MergeRefused, match="overflow"):
            brackets.add(values)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [0.0, 3.0])
    def test_values_that_are_all_equal_are_counted_and_not_held(
        self, size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rows, "SAMPLE", 4)
        brackets = Brackets.around([(0, 0.4), (1, 0.4)], torch.full((2, 4), size), 0.5)
        tile = torch.full((2, 100), size, dtype=dtype)
        tile[1, :4] = torch.tensor([4.0, 5.0, -6.0, size / 2])
        for _ in range(50):
            brackets.add(tile)
        assert not brackets.count.any()
        assert brackets.inside.shape[1] <= 4 * 100
        assert brackets.kth([1, 150]) == [size, None]
        assert brackets.kth([5000, 151]) == [size, size]
        last = 5000 - 50 * (size > 0)
        assert brackets.kth([5001, last + 1])[0] is None
        assert brackets.kth([1, last]) == [size, size]
        assert brackets.kth([1, last + 1])[1] is None

    @pytest.mark.parametrize(("measure", "road"), [(rows.entries, "add_all"), (lambda X: X, "add")])
    def test_most_entries_of_a_module_that_was_half_trained_are_not_held(
        self, measure: rows.Measure, road: str, stack_of: Any, random_adapters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pairs = random_adapters([3, 4], d_out=700, d_in=50)
        for _, B, _ in pairs:
            B[70:] = 0
        deltas = rows.DeltaRows.of(stack_of(pairs))
        counts = [[700, 3499, 20_000]] * 2
        exact = rows.largest(deltas, measure, counts)
        monkeypatch.setattr(rows, "SORTED", 100)
        monkeypatch.setattr(rows, "SAMPLE", 1 << 14)
        monkeypatch.setattr(rows, "TILE_BYTES", 1)
        held = -1
        add = getattr(Brackets, road)

        def watched(brackets: Any, *values: Any) -> None:
            nonlocal held
            add(brackets, *values)
            held = max(held, *brackets.count[[2, 5]].tolist())

        monkeypatch.setattr(Brackets, road, watched)
        assert rows.largest(deltas, measure, counts) == exact
        assert (exact[0][2], exact[1][2], held) == (0.0, 0.0, 0)

    @pytest.mark.parametrize("name", ["sce", "dare_linear_svd", "della_linear", "breadcrumbs_ties"])
    @pytest.mark.parametrize(("whole", "size"), [(1 << 20, 1e18), (100, 1e18), (100, 2e15)])
    def test_deltas_that_overflow_are_refused(
        self,
        whole: int,
        name: str,
        size: float,
        stack_of: Any,
        random_adapters: Any,
        run_method: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(rows, "SORTED", whole)
        monkeypatch.setattr(row_svd, "WHOLE", whole)
        monkeypatch.setattr(rows, "SAMPLE", 1 << 10)
        # of the smaller ones the entries themselves do not, but sums of their squares
        pairs = [(A * size, B * size, s) for A, B, s in random_adapters([3, 4], d_out=70, d_in=50)]
        with pytest.raises(MergeRefused, match="overflow") as caught:
            run_method(name, stack_of(pairs, [1e3, 1e3]), rank=4, **parameters(name))
        assert "float64" in (caught.value.hint or "")


class TestBreadcrumbs:
    @pytest.mark.parametrize("whole", [1 << 20, 100])
    def test_entries_that_are_as_large_as_the_largest_that_stays_all_stay(
        self, whole: int, stack_of: Any, run_method: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rows, "SORTED", whole)
        monkeypatch.setattr(rows, "SAMPLE", 1 << 10)
        sizes = torch.cat([torch.full((4, 1), 9.0), torch.full((60, 1), 5.0), torch.full((36, 1), 1.0)])
        A = torch.cat([torch.ones(1, 20), -torch.ones(1, 20)], 1)
        # 4 % are larger than the 60 % that are equal
        D = sizes @ A
        for gamma, expected in ((0.04, D * (sizes == 5)), (0.02, D * (sizes >= 5)), (0.5, D * (sizes <= 5))):
            found = run_method("breadcrumbs", stack_of([(A, sizes, 1.0)]), rank=4, density=0.3, gamma=gamma)
            assert near(found, expected.double())

    def test_a_density_of_no_entry_keeps_none(self, stack_of: Any, run_method: Any) -> None:
        stack = stack_of([(torch.ones(1, 3), torch.ones(3, 1), 1.0)])
        assert not run_method("breadcrumbs", stack, rank=1, density=0.1).any()


class TestDella:
    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("columns", [1, 60])
    def test_the_compiled_road_drops_what_the_algebra_drops(
        self, columns: int, rescale: bool, stack_of: Any, run_method: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # whole numbers, so that many are equal
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randint(-2, 3, (2, columns), generator=generator).float() for _ in range(2)]
        stack = stack_of([(A, torch.ones(40, 2), 1.0) for A in parts])
        rank = min(columns, 40)
        fast = run_method("della_linear", stack, rank=rank, rescale=rescale)
        monkeypatch.setattr(rules, "compiled", lambda _: False)
        assert float(fast.norm()) > 0
        assert near(fast, run_method("della_linear", stack, rank=rank, rescale=rescale))

    def test_probabilities_rise_with_the_rank_in_the_row(self) -> None:
        X = torch.tensor([[0.1, -3.0, 2.0], [5.0, 4.0, -6.0]])
        torch.testing.assert_close(keep_probabilities(X, 0.5, 0.2), torch.tensor([[0.3, 0.7, 0.5], [0.5, 0.3, 0.7]]))

    def test_it_is_unbiased(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        stack = stack_of(random_adapters([3, 2], d_out=9, d_in=12), [1.0, 0.5])
        draws = [run_method("della_linear", stack, rank=9, density=0.7, seed=seed) for seed in range(300)]
        exact = run_method("cat", stack)
        assert near(sum(draws) / 300, exact, 0.1)

    def test_probabilities_outside_0_and_1_are_refused(self) -> None:
        with pytest.raises(RequestInvalid, match="must lie between 0 and 1"):
            parse_parameters("della", {"density": 0.9, "epsilon": 0.15})


def test_dare_is_unbiased_and_seeded(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of(random_adapters([3, 2], d_out=9, d_in=12), [1.0, 0.5])
    draws = [run_method("dare_linear_svd", stack, rank=9, density=0.7, seed=seed) for seed in range(300)]
    assert near(sum(draws) / 300, run_method("cat", stack), 0.1)
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], run_method("dare_linear_svd", stack, rank=9, density=0.7, seed=0))


@pytest.mark.parametrize("name", sorted(SAMPLED))
def test_every_block_of_rows_has_masks_of_its_own(name: str, stack_of: Any, run_method: Any) -> None:
    stack = stack_of([(torch.ones(1, 6), torch.ones(2 * rows.TILE_ROWS, 1), 1.0)])
    kept = run_method(name, stack, rank=6, density=0.5).abs() > 1e-6
    first, second = kept.split(rows.TILE_ROWS)
    assert bool(first.any())
    assert not torch.equal(first, second)


def test_the_rank_may_exceed_the_sum_of_the_ranks(write_adapter: Callable[..., Path], merge: Any) -> None:
    sources = [write_adapter(f"r{i}", {"proj": (torch.randn(2, 30), torch.randn(20, 2))}) for i in range(2)]
    _, report = merge(sources, "ties_svd", rank=20)
    assert report.rank == 20
    assert report.modules[0].figures["truncation_error"] < 1e-5
    with pytest.raises(RankOutOfRange, match="the smaller side of every module; the largest is 20"):
        merge(sources, "ties_svd", rank=21)


def test_threads_do_not_change_the_bytes(write_adapter: Callable[..., Path], merge: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    modules = [
        {
            f"m{j}.proj": (torch.randn(3, 40, generator=generator), torch.randn(70, 3, generator=generator))
            for j in range(4)
        }
        for _ in range(2)
    ]
    sources = [write_adapter(f"t{i}", module) for i, module in enumerate(modules)]
    before = torch.get_num_threads()
    contents = []
    try:
        for number, threads in enumerate((1, 4), start=1):
            torch.set_num_threads(threads)
            merge(sources, "dare_ties_svd")
            contents.append((tmp_path / f"merged-{number}" / "adapter_model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_entries_rank_by_position(dtype: torch.dtype) -> None:
    X = torch.tensor([[2.0, -1.0, 1.0, 0.0, -2.0]], dtype=dtype)
    expected = torch.tensor([[0.5, 0.4, 0.45, 0.35, 0.55]], dtype=dtype)
    torch.testing.assert_close(keep_probabilities(X, 0.45, 0.1), expected)


@pytest.mark.parametrize("largest", [1.0, 1e12, 1e-41])
def test_short_keys_give_way_where_they_can_not_tell_sizes_apart(largest: float) -> None:
    X = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    X[0, 7] = largest
    X[1] *= 1e-42
    X[2] = 0
    X[2, 100:] = largest
    expected = keep_probabilities(X.double(), 0.5, 0.2)
    torch.testing.assert_close(keep_probabilities(X, 0.5, 0.2), expected.float(), rtol=0, atol=1e-6)


def test_a_row_that_is_too_long_for_short_keys_is_ordered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    expected = keep_probabilities(X, 0.5, 0.2)
    monkeypatch.setattr(entrywise, "MOST_PLACE_BITS", 8)
    assert torch.equal(keep_probabilities(X, 0.5, 0.2), expected)
