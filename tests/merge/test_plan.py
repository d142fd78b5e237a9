"""Every reason to refuse a merge, found without reading a tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifacts.base_model import BaseModelRef
from artifacts.errors import (
    BaseMismatch,
    MergeRefused,
    NotMergeable,
    RankOutOfRange,
    RankwiseError,
    RequestInvalid,
    ShapeMismatch,
)
from artifacts.manifest import LoraModule
from merge.catalog import METHODS, parse_parameters
from merge.plan import MergeInput, MergePlan, plan_merge


def module(path: str = "a.proj", rank: int = 4, d_out: int = 6, d_in: int = 8, **changes: Any) -> LoraModule:
    fields: dict[str, Any] = {
        "path": path,
        "kind": "linear",
        "a_key": f"{path}.A",
        "b_key": f"{path}.B",
        "rank": rank,
        "alpha": rank,
        "scaling": 1.0,
        "d_in": d_in,
        "d_out": d_out,
        "a_shape": (rank, d_in),
        "b_shape": (d_out, rank),
        "dtype": "F32",
    }
    return LoraModule(**{**fields, **changes})


def adapter(name: str, *modules: LoraModule, **changes: Any) -> MergeInput:
    fields: dict[str, Any] = {
        "id": name,
        "name": name,
        "digest": name * 8,
        "modules": modules or (module(),),
        "method": "lora",
        "mergeable": True,
        "refusal": None,
        "base": BaseModelRef.named("base"),
    }
    return MergeInput(**{**fields, **changes})


def plan(*inputs: MergeInput, method: str = "lego", **parameters: Any) -> MergePlan:
    return plan_merge(inputs, method, parse_parameters(method, parameters))


def pointers(error: RankwiseError) -> list[str]:
    return [item.pointer for item in error.errors]


def test_a_plain_merge() -> None:
    result = plan(adapter("one"), adapter("two", module(rank=2)))
    assert result.output_rank == 6  # 2r = 8, capped at Σ rᵢ
    assert [item.path for item in result.modules] == ["a.proj"]
    assert result.modules[0].rank_sum == 6
    assert result.compatibility == "shape"
    assert any(warning.startswith("compatibility_shape_only") for warning in result.warnings)


class TestWeights:
    def test_negative_only_where_it_means_something(self) -> None:
        with pytest.raises(RequestInvalid, match="no negative weight") as caught:
            plan(adapter("one"), adapter("two", weight=-1.0))
        assert pointers(caught.value) == ["/adapters/1/weight"]
        for method in ("cat", "svd", "linear"):
            assert plan(adapter("one"), adapter("two", weight=-1.0), method=method).weights == (1.0, -1.0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_only_finite_numbers(self, value: float, method: str) -> None:
        with pytest.raises(RequestInvalid, match="finite") as caught:
            plan(adapter("one", weight=value), method=method)
        assert pointers(caught.value) == ["/adapters/0/weight"]

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_not_all_zero(self, method: str) -> None:
        with pytest.raises(RequestInvalid, match="All weights are 0"):
            plan(adapter("one", weight=0.0), adapter("two", weight=0.0), method=method)

    def test_normalising_by_zero(self) -> None:
        with pytest.raises(RequestInvalid, match="divides by the sum") as caught:
            plan(adapter("one"), adapter("two", weight=-1.0), method="cat", normalize=True)
        assert pointers(caught.value) == ["/parameters/normalize"]


class TestInputs:
    def test_none(self) -> None:
        with pytest.raises(RequestInvalid, match="1 to 256"):
            plan()

    def test_the_same_twice(self) -> None:
        with pytest.raises(RequestInvalid, match="listed twice") as caught:
            plan(adapter("one"), adapter("two"), adapter("one"))
        assert pointers(caught.value) == ["/adapters/2/id"]

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_dora(self, method: str) -> None:
        dora = adapter("two", method="dora", mergeable=False, refusal="its magnitude makes it non-linear")
        with pytest.raises(NotMergeable, match="magnitude") as caught:
            plan(adapter("one"), dora, method=method)
        assert pointers(caught.value) == ["/adapters/1/id"]
        assert caught.value.code == "not_mergeable"

    def test_biases_go_where_they_can_be_summed(self) -> None:
        biased = adapter("two", module(bias_key="a.bias"))
        for method in ("lego", "svd"):
            with pytest.raises(NotMergeable, match="biases on lora_B"):
                plan(adapter("one"), biased, method=method)
        assert plan(adapter("one"), biased, method="linear").output_rank == 8


class TestShapes:
    @pytest.mark.parametrize(
        "other",
        [
            module(d_in=9, a_shape=(4, 9)),
            module(d_out=7, b_shape=(7, 4)),
            module(kind="embedding"),
            module(kind="conv", a_shape=(4, 2, 2, 2), b_shape=(6, 4, 1, 1)),
        ],
    )
    def test_they_must_agree(self, other: LoraModule) -> None:
        with pytest.raises(ShapeMismatch) as caught:
            plan(adapter("one"), adapter("two", other))
        assert pointers(caught.value) == ["a.proj"]
        assert "one: linear 6×8" in caught.value.errors[0].message

    def test_kernels_of_equal_size(self) -> None:
        wide = module(kind="conv", a_shape=(4, 2, 1, 4), b_shape=(6, 4, 1, 1))
        high = module(kind="conv", a_shape=(4, 2, 4, 1), b_shape=(6, 4, 1, 1))
        with pytest.raises(ShapeMismatch):
            plan(adapter("one", wide), adapter("two", high))

    def test_offenders_are_bounded(self) -> None:
        one = adapter("one", *(module(f"m{i:03}.proj") for i in range(30)))
        two = adapter("two", *(module(f"m{i:03}.proj", d_in=9, a_shape=(4, 9)) for i in range(30)))
        with pytest.raises(ShapeMismatch, match="and 10 more") as caught:
            plan(one, two)
        assert len(caught.value.errors) == 20


class TestModules:
    one, two = adapter("one", module("a.proj"), module("b.proj")), adapter("two", module("b.proj"), module("c.proj"))

    def test_union(self) -> None:
        result = plan(self.one, self.two)
        assert [item.path for item in result.modules] == ["a.proj", "b.proj", "c.proj"]
        assert [len(item.owners) for item in result.modules] == [1, 2, 1]
        assert any(warning.startswith("modules_not_in_every_adapter: 2 of 3") for warning in result.warnings)

    def test_intersection_names_what_it_drops(self) -> None:
        result = plan(self.one, self.two, missing_modules="intersection")
        assert [item.path for item in result.modules] == ["b.proj"]
        assert result.dropped == ("a.proj", "c.proj")

    def test_error(self) -> None:
        with pytest.raises(MergeRefused, match=r"not in every adapter: a\.proj, c\.proj"):
            plan(self.one, self.two, missing_modules="error")

    def test_nothing_in_common(self) -> None:
        with pytest.raises(MergeRefused, match="no module in common"):
            plan(adapter("one", module("a")), adapter("two", module("b")), missing_modules="intersection")

    def test_weight_zero_takes_no_part(self) -> None:
        result = plan(self.one, replace(self.two, weight=0.0))
        assert [item.path for item in result.modules] == ["a.proj", "b.proj"]


class TestRank:
    def test_above_the_sum_in_every_module(self) -> None:
        with pytest.raises(RankOutOfRange, match="the largest is 8") as caught:
            plan(adapter("one"), adapter("two"), rank=9)
        assert pointers(caught.value) == ["/parameters/rank"]

    def test_one_large_module_is_enough(self) -> None:
        one, two = adapter("one", module("a"), module("b", rank=1)), adapter("two", module("a"), module("b", rank=1))
        assert plan(one, two, rank=8).output_rank == 8

    @pytest.mark.parametrize(("rank", "expected"), [("r", 4), ("2r", 8), (3, 3)])
    def test_multiples(self, rank: object, expected: int) -> None:
        assert plan(*(adapter(f"a{i}") for i in range(3)), rank=rank).output_rank == expected


Refused = tuple[tuple[MergeInput, ...], str, dict[str, Any], type[RankwiseError], str, list[tuple[str, str]]]
"""Inputs, method and parameters → the error, its detail, and its findings."""

REFUSED: dict[str, Refused] = {
    "no adapter": (
        (),
        "lego",
        {},
        RequestInvalid,
        "A merge takes 1 to 256 adapters; 0 were given.",
        [
            ("/adapters", "needs 1 to 256 items"),
        ],
    ),
    "too many": (
        tuple(adapter(f"a{i}") for i in range(257)),
        "cat",
        {},
        RequestInvalid,
        "A merge takes 1 to 256 adapters; 257 were given.",
        [("/adapters", "needs 1 to 256 items")],
    ),
    "one twice": (
        (adapter("one"), adapter("two"), adapter("one")),
        "lego",
        {},
        RequestInvalid,
        "Adapter one is listed twice (positions 0 and 2).",
        [("/adapters/2/id", "duplicate id")],
    ),
    "a negative weight": (
        (adapter("one"), adapter("two", weight=-0.5)),
        "lego",
        {},
        RequestInvalid,
        "Method 'lego' averages and so takes no negative weight; two has -0.5.",
        [("/adapters/1/weight", "must not be negative")],
    ),
    "no number": (
        (adapter("one", weight=float("nan")),),
        "cat",
        {},
        RequestInvalid,
        "The weight of one is nan; it must be a finite number.",
        [("/adapters/0/weight", "must be finite")],
    ),
    "nothing but zeros": (
        (adapter("one", weight=0.0),),
        "cat",
        {},
        RequestInvalid,
        "All weights are 0: the merged adapter would do nothing.",
        [("/adapters", "at least one weight must not be 0")],
    ),
    "a sum of zero": (
        (adapter("one"), adapter("two", weight=-1.0)),
        "cat",
        {"normalize": True},
        RequestInvalid,
        "normalize divides by the sum of the weights, which is 0.0.",
        [("/parameters/normalize", "the weights sum to 0")],
    ),
    "t beside weights": (
        (adapter("one", weight=2.0), adapter("two")),
        "slerp",
        {"t": 0.5},
        RequestInvalid,
        "Give either t or weights: t says how far to go from the first adapter to the second.",
        [("/parameters/t", "leave it out, or leave the weights at 1")],
    ),
    "one for two": (
        (adapter("one"), adapter("two", weight=0.0)),
        "slerp",
        {},
        RequestInvalid,
        "Method 'slerp' merges exactly 2 adapters; 1 take part.",
        [("/adapters", "needs 2 items with weights other than 0")],
    ),
    "not mergeable": (
        (adapter("one"), adapter("two", method="ia3", mergeable=False, refusal="it multiplies.")),
        "cat",
        {},
        NotMergeable,
        "Adapter two (two) of type 'ia3' can not be merged by its factors: it multiplies.",
        [("/adapters/1/id", "it multiplies.")],
    ),
    "a bias": (
        (adapter("one", module(bias_key="b")),),
        "svd",
        {},
        NotMergeable,
        "Adapter one (one) has biases on lora_B, which method 'svd' can not merge.",
        [("/adapters/0/id", "has lora_bias")],
    ),
    "another base": (
        (adapter("one"), adapter("two", base=BaseModelRef.named("other"))),
        "cat",
        {},
        BaseMismatch,
        "one (base) and two (other) belong to different base models: ",
        [("/adapters/1/id", "base model other")],
    ),
    "too weak a proof": (
        (adapter("one"), adapter("two")),
        "cat",
        {"minimum_compatibility": "weights"},
        BaseMismatch,
        (
            "one (base) and two (base): that they share a base model is proven to the level 'shape' only; "
            "minimum_compatibility asks for 'weights'."
        ),
        [("/adapters/1/id", "base model base")],
    ),
    "missing modules": (
        (adapter("one", module("a"), module("b")), adapter("two", module("b"))),
        "cat",
        {"missing_modules": "error"},
        MergeRefused,
        "1 modules are not in every adapter: a.",
        [("/parameters/missing_modules", "a")],
    ),
    "nothing in common": (
        (adapter("one", module("a")), adapter("two", module("b"))),
        "cat",
        {"missing_modules": "intersection"},
        MergeRefused,
        "The adapters have no module in common.",
        [("/parameters/missing_modules", "nothing is left to merge")],
    ),
    "other sides": (
        (adapter("one"), adapter("two", module(d_in=9, a_shape=(4, 9)))),
        "cat",
        {},
        ShapeMismatch,
        "1 modules have other dimensions in one adapter than in another: a.proj (one: linear 6×8; two: linear 6×9).",
        [("a.proj", "one: linear 6×8; two: linear 6×9")],
    ),
    "unequal ranks": (
        (adapter("one"), adapter("two", module(rank=2))),
        "ties",
        {"unequal_ranks": "error"},
        MergeRefused,
        "Method 'ties' adds the factors of the adapters, whose ranks differ in 1 modules: a.proj.",
        [("/parameters/unequal_ranks", "a.proj")],
    ),
    "too large a rank": (
        (adapter("one"), adapter("two")),
        "svd",
        {"rank": 9},
        RankOutOfRange,
        "rank 9 is above the sum of the adapters' ranks of every module; the largest is 8.",
        [("/parameters/rank", "must be at most 8")],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_says_what_and_where(name: str) -> None:
    inputs, method, parameters, kind, detail, errors = REFUSED[name]
    with pytest.raises(kind) as caught:
        plan(*inputs, method=method, **parameters)
    assert caught.value.detail.startswith(detail)
    assert [(item.pointer, item.message) for item in caught.value.errors] == errors


def test_weights_that_nearly_cancel_may_be_normalised() -> None:
    """The bound is relative to the largest of them."""
    for size in (1e-6, 1.0, 1e6):
        both = adapter("one", weight=size), adapter("two", weight=-size * (1 - 1e-8))
        assert plan(*both, method="cat", normalize=True).weights[0] == pytest.approx(1e8, rel=1e-6)
        with pytest.raises(RequestInvalid, match="divides by the sum"):
            plan(both[0], adapter("two", weight=-size * (1 - 1e-10)), method="cat", normalize=True)


def test_twenty_modules_are_named_and_the_rest_is_counted() -> None:
    for count, more in ((20, ""), (21, " and 1 more")):
        one = adapter("one", module("z"), *(module(f"m{at:03}") for at in range(count)))
        names = ", ".join(f"m{at:03}" for at in range(20)) + more
        result = plan(one, adapter("two", module("z")))
        told = f"modules_not_in_every_adapter: {count} of {count + 1} modules have fewer owners: {names}."
        assert told in result.warnings
        result = plan(one, adapter("two", module("z")), missing_modules="intersection")
        assert f"{count} modules that not every adapter has were left out: {names}." in result.warnings
        with pytest.raises(MergeRefused) as caught:
            plan(one, adapter("two", module("z")), missing_modules="error")
        assert caught.value.detail == f"{count} modules are not in every adapter: {names}."
        assert len(caught.value.errors) == 20


def test_padding_is_told_where_there_is_some() -> None:
    one, two = adapter("one", module("a"), module("b")), adapter("two", module("a", rank=2), module("b"))
    found = [line for line in plan(one, two, method="ties").warnings if line.startswith("ranks_padded")]
    assert found == ["ranks_padded: in 1 of 2 modules the factors of smaller adapters were padded with zeros: a."]
    assert not any("ranks_padded" in line for line in plan(one, two, method="svd").warnings)
    assert not any("ranks_padded" in line for line in plan(one, one_more(one), method="ties").warnings)


def one_more(item: MergeInput) -> MergeInput:
    return replace(item, id="more", name="more")


class TestBase:
    def digests(self, *values: str) -> list[MergeInput]:
        refs = [replace(BaseModelRef.named("base"), weights_digest=value) for value in values]
        return [adapter(f"a{i}", base=ref) for i, ref in enumerate(refs)]

    def test_equal_digests_prove_it(self) -> None:
        result = plan(*self.digests("d1", "d1"))
        assert result.compatibility == "weights"
        assert not result.warnings

    def test_different_digests_are_refused(self) -> None:
        with pytest.raises(BaseMismatch) as caught:
            plan(*self.digests("d1", "d2"))
        assert caught.value.code == "base_model_mismatch"
        assert pointers(caught.value) == ["/adapters/1/id"]

    def test_different_names_are_refused_unless_told_otherwise(self) -> None:
        one, two = adapter("one"), adapter("two", base=BaseModelRef.named("other"))
        with pytest.raises(BaseMismatch, match="different base models"):
            plan(one, two)
        result = plan(one, two, minimum_compatibility="shape")
        assert any(line.startswith("base_models_differ: one (base) and two (other): ") for line in result.warnings)
        (shape,) = [line for line in result.warnings if line.startswith("compatibility_shape_only")]
        assert "(base, other)" in shape

    def test_a_minimum_is_a_minimum(self) -> None:
        with pytest.raises(BaseMismatch, match="asks for 'weights'"):
            plan(adapter("one"), adapter("two"), minimum_compatibility="weights")
        assert plan(*self.digests("d", "d"), minimum_compatibility="weights").compatibility == "weights"

    def test_proofs_are_pairwise(self) -> None:
        """The first and the third adapter fit the second, but not each other."""
        known, unknown, other = self.digests("d1", "d1", "d2")
        unknown = replace(unknown, base=BaseModelRef.named("base"))
        with pytest.raises(BaseMismatch):
            plan(known, unknown, other)
