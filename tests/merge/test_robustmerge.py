"""RobustMerge: the official formula written out, and its two readings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from merge.methods.robustmerge import component_scales


def official(adapters: list[Any]) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """ΔW' of the official code for equal ranks, and each adapter's pruned A, pruned B and scales."""
    parts = []
    for A, B, _ in adapters:
        pruned = []
        for X in (A.double(), B.double()):
            border = X.abs().flatten().kthvalue(int(X.numel() * 0.8)).values
            pruned.append(X * (X.abs() > border))
        z = A.double().abs().sum(1) / pruned[0].abs().sum(1)
        parts.append((pruned[0], pruned[1], z.clamp_min(float(z.sort().values[int(len(z) * 0.8)]))))
    A = 2 * sum(part[0] for part in parts)
    B = 2 * sum(part[1] * part[2] for part in parts) / sum(part[2] for part in parts)
    return B @ A, parts


def test_the_official_code(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    """25 or 30 entries a row, of which 20 % are a whole number: the official border is then this one."""
    adapters = [(A, B, 1.0) for A, B, _ in random_adapters([5, 5], d_out=30, d_in=25)]
    expected, parts = official(adapters)
    torch.testing.assert_close(run_method("robustmerge", stack_of(adapters)), expected, rtol=1e-4, atol=1e-4)
    total = sum(part[2] for part in parts)
    product = 2 * sum((part[1] * (part[2] / total)) @ part[0] for part in parts)
    result = run_method("robustmerge_product", stack_of(adapters))
    torch.testing.assert_close(result, product, rtol=1e-4, atol=1e-4)
    # the two readings are two methods
    assert float((product - expected).norm() / expected.norm()) > 0.3


def test_equal_scalings_multiply_the_result(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    one = [(A, B, 1.0) for A, B, _ in random_adapters([4, 4])]
    three = [(A, B, 3.0) for A, B, _ in one]
    for name in ("robustmerge", "robustmerge_product"):
        torch.testing.assert_close(
            run_method(name, stack_of(three)), 3 * run_method(name, stack_of(one)), rtol=1e-3, atol=1e-3
        )


def test_scales_by_hand() -> None:
    A = torch.tensor([[4.0, 1.0], [1.0, 1.0], [3.0, 3.0], [8.0, 0.0], [2.0, 1.0]])
    kept = torch.tensor([[4.0, 0.0], [0.0, 0.0], [3.0, 3.0], [8.0, 0.0], [2.0, 0.0]])
    # ratios 1.25, (nothing kept: the largest) 1.5, 1, 1, 1.5; the tail of 20 % starts at the fifth
    assert component_scales(A, kept, 0.2).tolist() == [1.5] * 5
    assert component_scales(A, kept, 0.6).tolist() == [1.25, 1.5, 1.25, 1.25, 1.5]
    assert component_scales(A, kept, 1.0).tolist() == [1.25, 1.5, 1.0, 1.0, 1.5]


def test_scales_do_not_depend_on_the_size_of_the_numbers() -> None:
    A = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    kept = A * (A.abs() > 0.7)
    for size in (2.0**-20, 2.0**20):
        assert torch.equal(component_scales(A * size, kept * size, 0.4), component_scales(A, kept, 0.4))
    nothing = component_scales(A, A * 0, 0.2)
    assert nothing.tolist() == [1.0] * 6


def test_the_options_are_those_of_the_formulas(stack_of: Any, random_adapters: Any, run_method: Any) -> None:
    stack = stack_of([(A, B, s * sign) for (A, B, s), sign in zip(random_adapters([4, 3]), (-1, 1), strict=True)])
    for name in ("robustmerge", "robustmerge_product"):
        whole = run_method(name, stack, coefficient=1.0)
        power = 2 if name == "robustmerge" else 1
        torch.testing.assert_close(run_method(name, stack, coefficient=3.0), 3.0**power * whole, rtol=1e-4, atol=1e-4)
    # the scale of a component weighs it against those of the others: alone it cancels
    one = stack_of(random_adapters([4])[:1])
    for name in ("robustmerge", "robustmerge_product"):
        torch.testing.assert_close(run_method(name, one, tail=0.0), run_method(name, one, tail=1.0))
        assert not torch.allclose(run_method(name, stack, tail=0.0), run_method(name, stack, tail=1.0), rtol=1e-3)
