"""Every method, at every rule and election, against its definition on dense matrices; the numbers are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dense_definitions import DEFINITIONS, Pool, lego
from hypothesis import given, settings
from hypothesis import strategies as st

from merge import rules
from merge.catalog import METHODS

WEIGHTS = ([1.0, -0.5, 2.0], [1.0, 0.5, 2.0])
"""Of methods that take negative ones, and of others."""
ELECTIONS = [{"majority_sign_method": election} for election in ("total", "frequency")]
ENTRYWISE = {"density": 0.4}


def variants(name: str) -> list[dict[str, Any]]:
    """The parameters that a method is tried with."""
    if name in {"cat", "linear"}:
        return [{}, {"normalize": True}]
    if name == "svd":
        return [{"rank": 2}, {"rank": 2, "normalize": True}]
    if name in {"core_space", "knots", "pico", "ctm"}:
        rules_of = METHODS[name].options.model_json_schema()["properties"]["rule"]["enum"]
        own: dict[str, Any] = {"rank": 3, "sweeps": 2} if name == "ctm" else {}
        return [
            {"rule": rule, **own, **({**ENTRYWISE, **election} if rule.endswith("ties") else {})}
            for rule in rules_of
            for election in (ELECTIONS if rule.endswith("ties") else ELECTIONS[:1])
        ]
    if name == "iso_cts":
        return [{"common_fraction": share} for share in (0.0, 0.6, 0.8, 1.0)]
    if name == "slerp":
        return [{}, {"t": 0.3}]
    fields = METHODS[name].options.model_fields
    own = {field: value for field, value in {"density": 0.4, "epsilon": 0.2, "gamma": 0.05}.items() if field in fields}
    found = [own, {**own, **ELECTIONS[1]}] if "majority_sign_method" in fields else [own]
    return [*found, *({**own, "normalize": value} for value in (True, False) if "normalize" in fields)]


CASES = [(name, options) for name in DEFINITIONS for options in variants(name)]


def pool_of(adapters: list[Any], weights: list[float], stack: Any, seed: int) -> Pool:
    """Masks follow the numbers of an adapter: their seeds are those of the product."""
    of_owner = [
        dict(zip([owner for owner, _ in stack.members], rules.seeds(stack, value), strict=True))
        for value in (seed, seed ^ (1 << 63))
    ]
    seeds = [[found[owner] for owner in range(len(adapters))] for found in of_owner]
    return Pool([(A.double().numpy(), B.double().numpy(), s) for A, B, s in adapters], weights, *seeds)


def test_every_method_has_a_definition_here_or_is_lego() -> None:
    assert set(DEFINITIONS) == set(METHODS) - {"lego"}


@settings(max_examples=4, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    sides=st.tuples(st.integers(6, 40), st.integers(6, 40)),
    scale=st.sampled_from([1.0, -1.5, 0.25]),
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_is_the_definition(
    name: str,
    options: dict[str, Any],
    seed: int,
    ranks: list[int],
    sides: tuple[int, int],
    scale: float,
    stack_of: Any,
    random_adapters: Any,
    run_method: Any,
) -> None:
    row = METHODS[name]
    if row.capabilities.only_adapters:
        ranks = [*ranks, 4][:2]
    adapters = random_adapters(ranks, *sides, seed=seed)
    weights = WEIGHTS[0 if row.capabilities.negative_weights else 1][: len(ranks)]
    stack = stack_of(adapters, weights, torch.float64)
    expected = scale * DEFINITIONS[name](pool_of(adapters, weights, stack, 0), options)
    rank = min(sides) if row.options.beyond_span else None
    if options.get("normalize") and row.capabilities.exact_sum:
        stack = stack_of(adapters, [weight / sum(weights) for weight in weights], torch.float64)
    result = run_method(name, stack, **({} if rank is None else {"rank": rank}), scale=scale, **options).numpy()
    assert float(np.linalg.norm(result - expected)) <= 1e-5 * float(np.linalg.norm(expected))


@settings(max_examples=4, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    clusters=st.integers(1, 5),
    flipped=st.booleans(),
)
@pytest.mark.parametrize("output_reweight", [True, False])
@pytest.mark.parametrize("norm", ["inf", "l2", None])
def test_lego_is_the_definition_where_nobody_doubts_the_clusters(
    norm: str | None,
    output_reweight: bool,
    seed: int,
    ranks: list[int],
    clusters: int,
    flipped: bool,
    stack_of: Any,
    run_method: Any,
) -> None:
    """Components are a few patterns with noise of 5 %, under any sign when signs are aligned."""
    random = np.random.default_rng(seed)
    patterns = random.standard_normal((clusters, 30 + 20))
    labels = [random.permutation(clusters)] + [random.integers(0, clusters, rank) for rank in ranks]
    weights = [0.5, 1.0, 2.0][: len(labels)]
    adapters = []
    for own, scaling in zip(labels, (2.0, 0.25, 1.0), strict=False):
        units = patterns[own] + 0.05 * random.standard_normal((len(own), 50))
        if flipped:
            units *= random.choice([-1.0, 1.0], (len(own), 1))
        units = torch.from_numpy(units / scaling**0.5)
        adapters.append((units[:, :30], units[:, 30:].T, scaling))
    stack = stack_of(adapters, weights, torch.float64)
    pool = Pool([(A.numpy(), B.numpy(), s) for A, B, s in adapters], weights, (), ())
    expected = lego(pool, [own.tolist() for own in labels], norm, output_reweight)
    preset = {} if flipped else {"preset": "paper"}
    reweights = {"parameter_reweight": norm or False, "output_reweight": output_reweight}
    result = run_method("lego", stack, clusters, **reweights, **preset).numpy()
    assert float(np.linalg.norm(result - expected)) <= 1e-5 * float(np.linalg.norm(expected))
