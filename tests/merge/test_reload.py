"""The check of a written file: what it measures, what it forgives, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.errors import ReloadMismatch
from merge.reload import CANCELLATION, TOLERANCE, Probe, check_reload

PATHS = ("layers.0.proj", "layers.1.proj")
Write = Callable[..., Path]


def factors(seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 12, generator=generator), torch.randn(10, rank, generator=generator)


def halved(path: str, A: Tensor, B: Tensor) -> Probe:
    return Probe.of(path, A, B, A.bfloat16(), B.bfloat16())


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_probe_is_the_product_before_and_after_the_cast() -> None:
    A, B = factors(1)
    whole, half = Probe.of(PATHS[0], A, B, A, B), halved(PATHS[0], A, B)
    assert torch.equal(whole.exact, whole.written)
    assert torch.equal(half.exact, whole.exact)
    assert torch.equal(half.written, Probe.of("", A.bfloat16(), B.bfloat16(), A, B).exact)
    assert 1e-4 < relative(half.written, half.exact) < 1e-2
    # ΔW·x is linear in either factor, and not the same in every direction
    assert relative(Probe.of("", 3 * A, B, A, B).exact, 3 * whole.exact) < 1e-6
    assert relative(Probe.of("", A, -2 * B, A, B).exact, -2 * whole.exact) < 1e-6
    assert relative(Probe.of("", A.flip(1), B, A, B).exact, whole.exact) > 0.1


def test_what_is_forgiven_grows_with_the_terms_that_cancel() -> None:
    A, B = factors(1)
    probe = Probe.of("", A, B, A, B)
    x_norm = float(torch.linalg.lstsq(B, probe.written[:, None]).solution.norm())  # ‖A·x‖
    assert probe.terms == pytest.approx(float(B.norm()) * x_norm, rel=1e-4)
    assert probe.tolerance == pytest.approx(TOLERANCE + CANCELLATION * probe.terms / float(probe.written.norm()))
    doubled = Probe.of(
        "", torch.cat([A, A]), torch.cat([B, -B * 0.999], 1), torch.cat([A, A]), torch.cat([B, -B * 0.999], 1)
    )
    assert doubled.tolerance > 500 * CANCELLATION > probe.tolerance - TOLERANCE
    assert Probe.of("", A, B * 0, A, B * 0).tolerance == TOLERANCE


def test_both_figures_are_the_largest_of_all_modules(write_adapter: Write) -> None:
    pairs = [factors(1), factors(2)]
    halves = {path: (A.bfloat16(), B.bfloat16()) for path, (A, B) in zip(PATHS, pairs, strict=True)}
    directory = write_adapter("half", halves)
    probes = [halved(path, A, B) for path, (A, B) in zip(PATHS, pairs, strict=True)]
    ticks: list[bool] = []
    for number, order in enumerate((probes, probes[::-1]), start=1):
        rounding, difference = check_reload(directory, order, lambda: ticks.append(True))
        assert rounding == pytest.approx(max(relative(item.written, item.exact) for item in probes))
        assert difference < 1e-6
        assert len(ticks) == number
    # a module may be off by what its tolerance allows, and that is told
    weights = directory / "adapter_model.safetensors"
    tensors = {key: value.float() for key, value in load_file(weights).items()}
    tensors[f"base_model.model.{PATHS[1]}.lora_A.weight"] *= 1 + 8e-6
    save_file(tensors, weights)
    _, difference = check_reload(directory, probes, lambda: None)
    assert difference == pytest.approx(8e-6, rel=0.1)


@pytest.mark.parametrize("factor", [1.0001, float("nan"), 0.0])
def test_another_number_is_found_in_any_module(factor: float, write_adapter: Write) -> None:
    pairs = {path: factors(number) for number, path in enumerate(PATHS)}
    directory = write_adapter("changed", pairs)
    probes = [Probe.of(path, A, B, A, B) for path, (A, B) in pairs.items()]
    check_reload(directory, probes, lambda: None)
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{PATHS[1]}.lora_B.weight"] *= factor
    save_file(tensors, weights)
    told = {1.0001: r"1\.00e-04", 0.0: r"1\.00e\+00"}.get(factor, "nan")
    with pytest.raises(ReloadMismatch, match=f"Module {PATHS[1]} of the written adapter differs by {told} from what"):
        check_reload(directory, probes, lambda: None)


def test_the_scaling_of_the_file_counts(write_adapter: Write) -> None:
    A, B = factors(1)
    directory = write_adapter("scaled", {PATHS[0]: (A, B)}, lora_alpha=6)
    with pytest.raises(ReloadMismatch, match=r"differs by 1\.00e\+00"):
        check_reload(directory, [Probe.of(PATHS[0], A, B, A, B)], lambda: None)
    check_reload(directory, [Probe.of(PATHS[0], A, 2 * B, A, 2 * B)], lambda: None)


def test_a_module_of_zeros(write_adapter: Write) -> None:
    A, B = factors(1)
    zero = Probe.of(PATHS[0], A, B * 0, A, B * 0)
    assert check_reload(write_adapter("zero", {PATHS[0]: (A, B * 0)}), [zero], lambda: None) == (0.0, 0.0)
    with pytest.raises(ReloadMismatch, match="differs by"):
        check_reload(write_adapter("more", {PATHS[0]: (A, B)}), [zero], lambda: None)


def test_a_module_that_is_not_there(write_adapter: Write) -> None:
    A, B = factors(1)
    with pytest.raises(ReloadMismatch) as caught:
        check_reload(write_adapter("one", {PATHS[0]: (A, B)}), [Probe.of("elsewhere", A, B, A, B)], lambda: None)
    assert caught.value.detail == "The written adapter does not hold module elsewhere."
