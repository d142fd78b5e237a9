"""Gradient fusion: the layer's problem by hand, and adapters made on tiny random pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from final_latents import final_latents, same

from artifacts.errors import RequestInvalid
from compose.fused_adapter import fuse
from compose.fused_layer import LayerProblem, truncated
from compose.request import Concept
from compose.validation import validate

QUICK = {"samples": 1}


def problem(counts: tuple[int, ...] = (40, 50), d_out: int = 7, d_in: int = 9) -> tuple[LayerProblem, Any]:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            torch.randn(d_out, d_in, generator=generator).double(),
            torch.randn(d_in, count, generator=generator).double(),
        )
        for count in counts
    ]
    found = LayerProblem.empty(d_out, d_in)
    for delta, X in parts:
        found.add(delta, X @ X.T)
    return found, parts


def test_the_closed_form_is_least_squares_over_all_activations() -> None:
    found, parts = problem()
    ridge = 1e-3
    X = torch.cat([X for _, X in parts], dim=1)
    wanted = torch.cat([delta @ X for delta, X in parts], dim=1)
    weight = (ridge * float((X @ X.T).diagonal().mean())) ** 0.5
    stacked = torch.cat([X.T, weight * torch.eye(9, dtype=torch.float64)])
    aims = torch.cat([wanted.T, torch.zeros(9, 7, dtype=torch.float64)])
    torch.testing.assert_close(found.closed_form(ridge), torch.linalg.lstsq(stacked, aims).solution.T)


def test_the_objective_is_the_sum_of_squares() -> None:
    found, parts = problem()
    D = torch.randn(7, 9, dtype=torch.float64)
    by_hand = sum(float(((delta - D) @ X).square().sum()) for delta, X in parts)
    assert found.objective(D) == pytest.approx(by_hand)
    assert found.objective(found.closed_form(1e-8)) < min(found.objective(delta) for delta, _ in parts)


def test_descent_ends_at_the_closed_form() -> None:
    found, _ = problem()
    torch.testing.assert_close(found.descended(200), found.closed_form(1e-10), atol=1e-6, rtol=0)
    assert found.objective(found.descended(1)) > found.objective(found.descended(5))


def test_activations_that_have_nothing_in_common_are_each_done_justice() -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    spaces = basis[:, :3], basis[:, 3:6]  # and two directions that nobody uses
    deltas = [torch.randn(5, 8, generator=generator).double() for _ in spaces]
    found = LayerProblem.empty(5, 8)
    for delta, space in zip(deltas, spaces, strict=True):
        found.add(delta, space @ space.T)
    for D in (found.closed_form(1e-8), found.descended(100)):
        for delta, space in zip(deltas, spaces, strict=True):
            torch.testing.assert_close(D @ space, delta @ space, atol=1e-6, rtol=0)
        torch.testing.assert_close(D @ basis[:, 6:], torch.zeros(5, 2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_layer_that_nothing_went_through_stays_as_it_is() -> None:
    empty = LayerProblem.empty(3, 4)
    empty.add(torch.ones(3, 4), torch.zeros(4, 4))
    assert not bool(empty.closed_form(1e-6).any())
    assert not bool(empty.descended(5).any())


def test_the_truncation_tells_its_error() -> None:
    D = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)).double()
    for rank in (1, 3, 6, 20):
        cut = truncated(D, rank)
        assert cut.A.shape == (min(rank, 6), 9)
        assert cut.error == pytest.approx(float((D - cut.B @ cut.A).norm() / D.norm()), abs=1e-7)
    assert cut.error == pytest.approx(0, abs=1e-12)
    assert truncated(torch.zeros(3, 3), 2).error == 0


def alone(request: Any, directory: Path) -> Any:
    concept = (Concept(directory, "fused", "sks", "circle"),)
    return replace(request, method="merge", parameters={}, concepts=concept, prompt="a sks circle and a square")


@pytest.mark.parametrize("solver", ["closed_form", "lbfgs"])
def test_one_adapter_twice_is_that_adapter(toys: Any, pipelines: Any, tmp_path: Path, solver: str) -> None:
    """On its own prompt, where all that is asked of it was seen."""
    request = toys.request(method="gradient_fusion", steps=3)
    first = request.concepts[0]
    prompt = "a sks circle and a square"
    parameters = {
        "samples": 2, "solver": solver, "ridge": 1e-10, "concept_prompts": [prompt] * 2, "place_iterations": 400,
    }  # fmt: skip
    request = replace(request, concepts=(first, replace(first, trigger="zwx", noun="square")), parameters=parameters)
    found = fuse(request, pipelines, tmp_path / "fused")
    figures = found.report["objective"]
    assert figures["fused"] < 1e-4 * figures["weighted_sum"]
    assert found.report["truncation_error"]["largest"] < 1e-2  # ΔW has rank 2 of the 4 that are kept
    reference = replace(request, method="merge", parameters={}, concepts=(first,), prompt=prompt)
    difference = final_latents(alone(request, found.directory), pipelines) - final_latents(reference, pipelines)
    silent = replace(reference, concepts=(replace(first, weight=0.0),))
    effect = final_latents(silent, pipelines) - final_latents(reference, pipelines)
    assert float(difference.norm()) < 0.02 * float(effect.norm())


def test_two_adapters_the_order_does_not_matter_and_the_whole_rank_loses_nothing(
    toys: Any, pipelines: Any, tmp_path: Path
) -> None:
    request = toys.request(method="gradient_fusion", parameters={**QUICK, "rank": 64}, steps=2, height=40, width=24)
    found = fuse(request, pipelines, tmp_path / "one")
    figures = found.report["objective"]
    assert figures["fused"] < figures["weighted_sum"]
    assert figures["stored"] == pytest.approx(figures["fused"], rel=1e-6)
    assert found.report["truncation_error"]["largest"] < 1e-6
    assert found.rank <= 64
    enough = fuse(replace(request, parameters=QUICK), pipelines, tmp_path / "enough")  # the ranks together
    assert enough.rank == 4
    assert enough.report["truncation_error"]["largest"] < 1e-6
    narrow = fuse(replace(request, parameters={**QUICK, "rank": 1}), pipelines, tmp_path / "narrow").report
    assert narrow["truncation_error"]["largest"] > 0.1
    assert narrow["objective"]["stored"] > narrow["objective"]["fused"]


def test_concepts_in_another_order_with_their_own_seeds_are_the_same_problem(
    sd: Any, pipelines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each concept's samples start from the same noise here, whatever its place."""
    import compose.methods.gradient_fusion as module

    real = module.sample_alone
    monkeypatch.setattr(
        module, "sample_alone", lambda scene, adapters, words, count, offset, advance: real(
            scene, adapters, words, count, 0, advance
        )
    )  # fmt: skip
    request = sd.request(method="gradient_fusion", parameters=QUICK, steps=2)
    one = fuse(request, pipelines, tmp_path / "one")
    two = fuse(replace(request, concepts=request.concepts[::-1]), pipelines, tmp_path / "two")
    same(
        final_latents(alone(request, one.directory), pipelines), final_latents(alone(request, two.directory), pipelines)
    )


def test_counts_and_prompts_that_do_not_fit_are_refused(sd: Any) -> None:
    request = sd.request(method="gradient_fusion", parameters={"concept_prompts": ["a"]})
    with pytest.raises(RequestInvalid) as refused:
        validate(request, yields="adapter")
    assert [item.pointer for item in refused.value.errors] == ["/parameters/concept_prompts"]
    with pytest.raises(RequestInvalid, match="at least 2"):
        validate(replace(request, concepts=request.concepts[:1], parameters={}), yields="adapter")
