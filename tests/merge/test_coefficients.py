"""SLERP, Karcher mean and Model Stock against the same on dense deltas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifacts.errors import RequestInvalid
from merge.catalog import find_method, parse_parameters

PATH = "layers.0.proj"


def deltas(adapters: list[Any]) -> list[Tensor]:
    return [s * B.double() @ A.double() for A, B, s in adapters]


def slerp(one: Tensor, two: Tensor, t: float) -> Tensor:
    theta = math.acos(float((one * two).sum() / one.norm() / two.norm()))
    return math.sin((1 - t) * theta) / math.sin(theta) * one + math.sin(t * theta) / math.sin(theta) * two


class TestSlerp:
    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_against_dense_vectors(self, t: float, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        adapters = random_adapters([3, 5])
        expected = slerp(*deltas(adapters), t)
        torch.testing.assert_close(run_method("slerp", stack_of(adapters), t=t), expected, rtol=1e-5, atol=1e-4)

    def test_weights_give_t(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        adapters = random_adapters([3, 5])
        by_weights = run_method("slerp", stack_of(adapters, [3.0, 1.0]))
        torch.testing.assert_close(by_weights, run_method("slerp", stack_of(adapters), t=0.25))

    def test_nearly_parallel_deltas_are_interpolated_on_a_line(self, stack_of: Any, run_method: Any) -> None:
        A, B = torch.randn(2, 9), torch.randn(7, 2)
        result = run_method("slerp", stack_of([(A, B, 1.0), (3 * A, B, 1.0)]), t=0.5)
        torch.testing.assert_close(result, 2 * B.double() @ A.double(), rtol=1e-5, atol=1e-5)

    def test_the_first_of_the_request_is_t_0(
        self, write_adapter: Callable[..., Path], merge: Any, dense_delta: Any
    ) -> None:
        sources = [write_adapter(f"s{i}", {PATH: (torch.randn(2, 9), torch.randn(7, 2))}) for i in range(2)]
        for order in (sources, sources[::-1]):
            result, _ = merge(order, "slerp", t=0.0)
            torch.testing.assert_close(result[PATH], dense_delta(order[0], PATH), rtol=1e-5, atol=1e-5)

    def test_it_takes_two(self, write_adapter: Callable[..., Path], merge: Any) -> None:
        sources = [write_adapter(f"n{i}", {PATH: (torch.randn(2, 9), torch.randn(7, 2))}) for i in range(3)]
        with pytest.raises(RequestInvalid, match="exactly 2 adapters; 3 take part") as caught:
            merge(sources, "slerp")
        assert caught.value.errors[0].pointer == "/adapters"

    def test_t_and_weights_exclude_each_other(self, write_adapter: Callable[..., Path], merge: Any) -> None:
        sources = [write_adapter(f"w{i}", {PATH: (torch.randn(2, 9), torch.randn(7, 2))}) for i in range(2)]
        with pytest.raises(RequestInvalid, match="either t or weights") as caught:
            merge(sources, "slerp", weights=[1.0, 0.5], t=0.5)
        assert caught.value.errors[0].pointer == "/parameters/t"

    def test_a_module_of_one_adapter_stays_as_it_is(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        ((A, B, s),) = random_adapters([3])
        result = run_method("slerp", stack_of([(A, B, s)]), t=0.25)
        torch.testing.assert_close(result, s * B.double() @ A.double(), rtol=1e-5, atol=1e-5)

    def test_figures(self, stack_of: Any, random_adapters: Any) -> None:
        adapters = random_adapters([3, 5])
        one, two = deltas(adapters)
        merged = find_method("slerp").load()(stack_of(adapters), parse_parameters("slerp", {}), 8)
        assert merged.figures == {"cosine": pytest.approx(float((one * two).sum() / one.norm() / two.norm()))}
        nothing = [adapters[0], (adapters[1][0], adapters[1][1] * 0, 1.0)]
        merged = find_method("slerp").load()(stack_of(nothing), parse_parameters("slerp", {}), 8)
        assert merged.figures == {"cosine": 0.0}
        # at a right angle halfway is 1/√2 of either
        torch.testing.assert_close(merged.B.double() @ merged.A.double(), one / 2**0.5, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("turn", [1.0, -1.0])
    def test_the_straight_line_begins_where_mergekits_does(self, turn: float, stack_of: Any, run_method: Any) -> None:
        """At a cosine of 0.9995; and so do deltas that point apart, between which there is no shortest way."""
        A, B = torch.eye(2, 9), torch.eye(7, 2)
        for cosine, straight in ((0.9996, True), (0.9994, False)):
            sine = (1 - cosine**2) ** 0.5
            other = (turn * torch.diag(torch.tensor([cosine, sine])) @ A, B, 1.0)
            adapters = [(A * torch.tensor([[1.0], [0.0]]), B, 1.0), other]
            one, two = deltas(adapters)
            line, circle = 0.7 * one + 0.3 * two, slerp(one, two, 0.3)
            result = run_method("slerp", stack_of(adapters), t=0.3)
            torch.testing.assert_close(result, line if straight else circle, rtol=0, atol=2e-7 if turn > 0 else 1e-5)
            assert turn > 0 or float((line - circle).norm()) > 0.1


class TestKarcher:
    def test_the_gradient_vanishes_there(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        """The defining property, on dense vectors: Σ wᵢ·log_m(uᵢ) = 0."""
        adapters, weights = random_adapters([3, 5, 2]), [1.0, 0.5, 2.0]
        result = run_method("karcher", stack_of(adapters, weights))
        mean = result / result.norm()
        gradient = torch.zeros_like(mean)
        for delta, weight in zip(deltas(adapters), weights, strict=True):
            unit = delta / delta.norm()
            cosine = float((unit * mean).sum())
            gradient += weight * math.acos(cosine) / math.sin(math.acos(cosine)) * (unit - cosine * mean)
        assert float(gradient.norm()) < 1e-5
        norms = torch.tensor([float(delta.norm()) for delta in deltas(adapters)])
        assert float(result.norm()) == pytest.approx(float((norms * torch.tensor(weights)).sum() / 3.5), rel=1e-5)

    def test_of_two_it_is_halfway_on_the_great_circle(
        self, stack_of: Any, random_adapters: Any, run_method: Any
    ) -> None:
        adapters = random_adapters([3, 5])
        one, two = deltas(adapters)
        halfway = slerp(one / one.norm(), two / two.norm(), 0.5) * (one.norm() + two.norm()) / 2
        torch.testing.assert_close(run_method("karcher", stack_of(adapters)), halfway, rtol=1e-5, atol=1e-4)

    def test_opposite_deltas_have_no_mean_but_a_result(self, stack_of: Any, run_method: Any) -> None:
        A, B = torch.randn(2, 9), torch.randn(7, 2)
        result = run_method("karcher", stack_of([(A, B, 1.0), (-A, B, 1.0)]))
        assert bool(torch.isfinite(result).all())

    def test_how_far_it_came_is_told(self, stack_of: Any, random_adapters: Any) -> None:
        stack = stack_of(random_adapters([3, 5, 2]))

        def steps(**options: Any) -> float:
            found = find_method("karcher").load()(stack, parse_parameters("karcher", options), 10).figures["iterations"]
            assert isinstance(found, float)
            return found

        assert steps(max_iter=1) == 1
        assert 1 < steps(tol=1e-4) < steps() < 20
        assert steps(tol=1.0) == 0

    def test_a_delta_of_zero_has_no_direction(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        (A, B, s), (C, D, _) = random_adapters([3, 2])
        result = run_method("karcher", stack_of([(A, B, s), (C, D * 0, 1.0)], [1.0, 3.0]))
        # of the weighted mean of the norms it takes its quarter
        torch.testing.assert_close(result, s * B.double() @ A.double() / 4, rtol=1e-5, atol=1e-5)


class TestModelStock:
    def test_against_dense_vectors(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        adapters = random_adapters([3, 5, 2])
        D = deltas(adapters)
        cosines = [float((D[i] * D[j]).sum() / D[i].norm() / D[j].norm()) for i in range(3) for j in range(i)]
        c = sum(cosines) / 3
        expected = 3 * c / (1 + 2 * c) * (D[0] + D[1] + D[2]) / 3
        torch.testing.assert_close(run_method("model_stock", stack_of(adapters)), expected, rtol=1e-4, atol=1e-4)

    def test_copies_of_one_adapter_are_that_adapter(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        ((A, B, s),) = random_adapters([3])
        result = run_method("model_stock", stack_of([(A, B, s), (A, B, s)]))
        torch.testing.assert_close(result, s * B.double() @ A.double(), rtol=1e-5, atol=1e-4)

    def test_opposite_deltas_stay_at_the_base(self, stack_of: Any, random_adapters: Any, run_method: Any) -> None:
        (A, B, s), (C, D, _) = random_adapters([3, 2])
        assert float(run_method("model_stock", stack_of([(A, B, s), (-A, B, s), (C * 0, D, 1.0)])).norm()) == 0.0

    def test_figures_and_negative_weights(self, stack_of: Any, random_adapters: Any) -> None:
        """An adapter of weight −1 is one whose delta points the other way."""
        adapters = random_adapters([3, 5])
        one, two = deltas(adapters)
        cosine = float((one * two).sum() / one.norm() / two.norm())
        turned = [adapters[0], (adapters[1][0], -adapters[1][1], adapters[1][2])]
        for given, weights in ((adapters, [1.0, 1.0]), (turned, [1.0, -1.0])):
            merged = find_method("model_stock").load()(stack_of(given, weights), parse_parameters("model_stock", {}), 8)
            assert merged.figures == {
                "cosine": pytest.approx(cosine),
                "t": pytest.approx(2 * cosine / (1 + cosine)),
            }
        single = find_method("model_stock").load()(
            stack_of(adapters[:1], [0.5]), parse_parameters("model_stock", {}), 3
        )
        assert single.figures == {"cosine": 1.0, "t": 1.0}
        torch.testing.assert_close(single.B.double() @ single.A.double(), one / 2, rtol=1e-5, atol=1e-5)
