"""What holds of every method: order, scale, identity where it is promised, truncation, several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.catalog import METHODS, parse_parameters

NAMES = sorted(METHODS)
BY_PLACE = {
    "linear_factor",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "robustmerge",
    "robustmerge_product",
}
"""Methods that pair components by their rows in the files: their result depends on the order in an adapter."""
RULES = {
    "core_space": ("sum", "ties", "dare", "tsv", "iso"),
    "knots": ("sum", "ties", "dare", "dare_ties"),
    "pico": ("sum", "ties", "tsv"),
    "ctm": ("sum", "ties", "dare", "tsv", "iso"),
}
VARIANTS = [(name, {"rule": rule}) for name, rules in RULES.items() for rule in rules] + [
    (name, {}) for name in NAMES if name not in RULES
]
"""Every method, at each of its rules."""
NO_IDENTITY = {"slerp", "iso_c", "iso_cts"}
"""One takes two adapters; the others make all singular values one, as does the rule iso: that is their point."""
IDENTITY: list[tuple[str, dict[str, Any]]] = [
    (name, {**options, **({"density": 1} if "density" in METHODS[name].options.model_fields else {}), **own})
    for name, options in VARIANTS
    if name not in NO_IDENTITY and options.get("rule") != "iso"
    for own in ([{"coefficient": 1}] if name.startswith("robust") else [{}])
]
"""What returns a single adapter unchanged when nothing is trimmed or dropped."""

IN_COMPONENTS = {
    "lego", "cat", "svd", "linear", "core_space", "tsv_m", "iso_c", "iso_cts", "pico", "ctm", "slerp", "karcher",
    "model_stock", "linear_factor",
}  # fmt: skip
"""Methods whose result has coordinates in the components of the adapters, by which the report measures it."""

OWN_RANK = {"lego", "ctm", "iso_c", "iso_cts"}
"""Where the rank is more than a truncation, or all singular values are one, so that no truncation is the best."""


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).norm()) <= tolerance * max(float(other.norm()), 1e-9)


def ranked(name: str) -> bool:
    return "rank" in METHODS[name].options.model_fields


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_order_of_adapters_and_components_changes_nothing(
    name: str, options: dict[str, Any], stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    adapters = random_adapters([3, 5] if METHODS[name].capabilities.only_adapters else [3, 5, 4])
    weights = [1.0] * len(adapters) if METHODS[name].capabilities.only_adapters else [1.0, 0.5, 2.0]
    one = run_method(name, stack_of(adapters, weights), **options)
    other = stack_of(adapters[::-1], weights[::-1], shuffle=None if name in BY_PLACE else 3)
    if name in {"core_space", "knots"}:
        # equal to the last bit: everything starts from the same stack
        assert torch.equal(one, run_method(name, other, **options))
    assert close(run_method(name, other, **options), one, 1e-6)


@pytest.mark.parametrize("name", sorted(BY_PLACE))
def test_methods_by_place_do_depend_on_the_order_of_components(
    name: str, stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    adapters = random_adapters([8, 8])
    assert not close(run_method(name, stack_of(adapters, shuffle=3)), run_method(name, stack_of(adapters)), 1e-3)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_scale_multiplies_the_result(
    name: str, options: dict[str, Any], stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    stack = stack_of(random_adapters([3, 5]))
    assert close(run_method(name, stack, scale=-2.5, **options), -2.5 * run_method(name, stack, **options))


@pytest.mark.parametrize("size", [2.0**-14, 2.0**14])
@pytest.mark.parametrize("name", NAMES)
def test_the_common_size_of_the_adapters_is_that_of_the_result(
    name: str, size: float, stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    """What is small is small beside the largest, never beside 1. Masks are left out: they follow the numbers."""
    fixed = {"density": 1.0} if "density" in METHODS[name].options.model_fields else {}
    adapters = random_adapters([3, 5])
    sized = [(A * size, B * size, s) for A, B, s in adapters]
    one = run_method(name, stack_of(adapters), **fixed)
    assert close(run_method(name, stack_of(sized), **fixed), one * size**2)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_PLACE or name.startswith("robust")])
def test_a_negative_scaling_is_that_of_the_other_delta(
    name: str, stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    """Without masks, which follow the numbers, and PEFT's sums of factors, in which the sign goes with the weight."""
    fixed = {"density": 1.0} if "density" in METHODS[name].options.model_fields else {}
    (A, B, s), other = random_adapters([3, 5])
    one = run_method(name, stack_of([(A, B, -s), other]), **fixed)
    turned = run_method(name, stack_of([(A, -B, s), other]), **fixed)
    assert close(one, turned, 1e-4)
    assert not close(one, run_method(name, stack_of([(A, B, s), other]), **fixed), 1e-2)


@pytest.mark.parametrize(("name", "options"), IDENTITY)
def test_a_single_adapter_comes_back(
    name: str, options: dict[str, Any], stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    ((A, B, s),) = random_adapters([5])
    stack = stack_of([(A, B, s)])
    assert close(run_method(name, stack, **options), s * B.double() @ A.double())


@pytest.mark.parametrize("name", [name for name in NAMES if ranked(name) and name not in OWN_RANK])
def test_a_rank_truncates_what_there_would_be(name: str, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of(random_adapters([3, 5]))
    whole = run_method(name, stack) if name != "svd" else run_method(name, stack, rank=8)
    U, S, Vh = torch.linalg.svd(whole)
    assert close(run_method(name, stack, rank=3), (U[:, :3] * S[:3]) @ Vh[:3])


@pytest.mark.parametrize("signs", ["plus", "of scalings", "of weights", "of both"])
@pytest.mark.parametrize("name", sorted(IN_COMPONENTS))
def test_coordinates_are_those_of_the_factors(name: str, signs: str, stack_of: Any, random_adapters: Any) -> None:
    (A, B, s), other = random_adapters([3, 5])
    turned = signs in ("of weights", "of both") and METHODS[name].capabilities.negative_weights
    weights = [1.0, -0.5 if turned else 0.5]
    stack = stack_of([(A, B, -s if signs in ("of scalings", "of both") else s), other], weights)
    merged = METHODS[name].load()(stack, parse_parameters(name, {"scale": 1.5}), 8)
    assert merged.coordinates is not None
    by_them = merged.stack.B.double() @ merged.coordinates.dense() @ merged.stack.A.double()
    assert close(merged.B.double() @ merged.A.double(), by_them)


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize(
    ("dropping", "other"),
    [
        (("dare_linear", {}), ("linear_factor", {})),
        (("dare_ties", {}), ("ties", {})),
        (("dare_linear_svd", {}), ("linear", {})),
        (("dare_ties_svd", {}), ("ties_svd", {})),
        (("magnitude_prune", {}), ("linear_factor", {})),
        (("magnitude_prune_svd", {}), ("linear", {})),
        (("core_space", {"rule": "dare"}), ("core_space", {"rule": "sum"})),
        (("core_space", {"rule": "ties"}), ("core_space", {"rule": "ties"})),
        (("knots", {"rule": "dare"}), ("knots", {"rule": "sum"})),
        (("knots", {"rule": "ties"}), ("knots", {"rule": "ties"})),
    ],
    ids=lambda item: " ".join([item[0], *item[1].values()]),
)
def test_nothing_is_dropped_at_density_1(
    dropping: tuple[str, dict[str, Any]],
    other: tuple[str, dict[str, Any]],
    election: str,
    stack_of: Any,
    random_adapters: Any,
    run_method: Any,
) -> None:
    """And where signs are elected, the two elections differ."""
    stack = stack_of(random_adapters([3, 5, 4]), [1.0, 0.5, 2.0])

    def run(method: tuple[str, dict[str, Any]], **more: Any) -> torch.Tensor:
        fields = METHODS[method[0]].options.model_fields
        return run_method(method[0], stack, **method[1], **{key: more[key] for key in more if key in fields})

    whole = run(dropping, density=1.0, majority_sign_method=election)
    assert close(whole, run(other, density=1.0, majority_sign_method=election))
    if "ties" in str(dropping):
        away = {"total": "frequency", "frequency": "total"}[election]
        assert not close(whole, run(dropping, density=1.0, majority_sign_method=away), 1e-3)
    elif dropping[0] != "linear":
        assert not close(whole, run(dropping, density=0.5), 1e-2)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    name=st.sampled_from(NAMES),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_nothing_breaks_when_components_outnumber_dimensions(
    seed: int, ranks: list[int], name: str, sides: tuple[int, int], stack_of: Any, random_adapters: Any, run_method: Any
) -> None:
    stack = stack_of(random_adapters(ranks, *sides, seed=seed))
    result = run_method(name, stack)
    assert result.shape == sides
    assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize("name", NAMES)
def test_zero_deltas_are_no_trouble(name: str, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    (A, B, s), (other_A, other_B, _) = random_adapters([3, 2])
    result = run_method(name, stack_of([(A, B, s), (other_A, other_B * 0, 1.0)]))
    assert bool(torch.isfinite(result).all())
    nothing = run_method(name, stack_of([(A, B * 0, s), (other_A, other_B * 0, 1.0)]))
    assert float(nothing.abs().max()) == 0.0
