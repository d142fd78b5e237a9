"""The AdamW of projected gradients: its spaces, its moments and what it keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from train import projected_adamw
from train.block_quantization import decode_signed, decode_square, encode_signed, encode_square
from train.projected_adamw import ProjectedAdamW, find_basis, state_bytes
from train.projection import Projection

R, T = 4, 5
SIDES = {"lora_A": (8, 24), "lora_B": (20, 8)}
"""r = 8 between 24 inputs and 20 outputs."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(0.1 * drawn(*sides, seed=20)) for name, sides in SIDES.items()}


def optimizer_of(values: dict[str, nn.Parameter], lr: float = 0.01, **changes: Any) -> ProjectedAdamW:
    projection = Projection(**{"rank": R, "interval": T} | changes)
    return ProjectedAdamW([{"params": list(values.values()), "projected": True}], projection, lr=lr)


def take(optimizer: ProjectedAdamW, values: dict[str, nn.Parameter], first: int, last: int) -> None:
    """Steps with gradients of their own, the same whenever they are taken."""
    for step in range(first, last):
        for number, value in enumerate(values.values()):
            value.grad = drawn(*value.shape, seed=100 * step + number).to(value.dtype)
        optimizer.step()


@pytest.mark.parametrize("sides", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(8, 24), (20, 8), (6, 6), (90, 70)])
def test_a_basis_is_orthonormal_and_spans_the_leading_singular_vectors(shape: tuple[int, int], sides: Any) -> None:
    D = drawn(*shape, seed=7).float()
    basis = find_basis(D, R, *Projection(R, T, sides=sides).projects(*shape))
    U, _, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    for found, expected in ((basis.left, U[:, :R]), (None if basis.right is None else basis.right.T, Vh[:R].T)):
        if found is not None:
            torch.testing.assert_close(found.T @ found, torch.eye(R), rtol=0, atol=1e-5)
            torch.testing.assert_close((found @ found.T).double(), expected @ expected.T, rtol=0, atol=1e-4)
    wide = shape[0] < shape[1]
    wanted = {"std": (wide, not wide), "reverse_std": (not wide, wide), "left": (True, False), "right": (False, True)}
    assert (basis.left is not None, basis.right is not None) == wanted.get(sides, (True, True))


def test_a_space_of_the_whole_rank_loses_nothing_and_a_smaller_one_does() -> None:
    """Oracle 3, with the gradient in the place of Adam's update."""
    for name, sides in SIDES.items():
        D = drawn(*sides, seed=8)
        for rank, lossless in ((8, True), (R, False)):
            basis = find_basis(D, rank, *Projection(rank, T).projects(*sides))
            assert (float((basis.up(basis.down(D)) - D).abs().max()) < 1e-5) is lossless, name


def test_a_parameter_stays_in_its_space_until_the_next_one() -> None:
    values = parameters()
    optimizer = optimizer_of(values)
    start = {name: value.detach().clone() for name, value in values.items()}

    def outside() -> list[float]:
        """How much of the moves lies outside of the first space."""
        A, B = (values[name].detach() - start[name] for name in SIDES)
        return [float((A - U @ U.T @ A).norm() / A.norm()), float((B - B @ Q.T @ Q).norm() / B.norm())]

    take(optimizer, values, 0, 1)
    U, Q = optimizer.state[values["lora_A"]]["left"], optimizer.state[values["lora_B"]]["right"]
    take(optimizer, values, 1, T)
    assert max(outside()) < 1e-6
    take(optimizer, values, T, T + 1)
    assert min(outside()) > 1e-3


def test_a_space_is_chosen_every_so_many_steps_and_moments_have_its_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return find_basis(*given)

    monkeypatch.setattr(projected_adamw, "find_basis", counted)
    values = parameters()
    optimizer, per_step = optimizer_of(values), []
    for step in range(2 * T + 2):
        take(optimizer, values, step, step + 1)
        per_step.append(optimizer.refreshed)
    assert len(calls) == 2 * 3
    assert [step for step, count in enumerate(per_step) if count] == [0, T, 2 * T]
    A, B = (optimizer.state[value] for value in values.values())
    assert A["first"].shape == A["second"].shape == (R, 24)
    assert B["first"].shape == B["second"].shape == (20, R)
    # In float64 every number takes twice the bytes that the estimate tells for float32.
    expected = sum(Projection(R, T).state_bytes(*sides) for sides in SIDES.values())
    assert state_bytes(optimizer) == 2 * expected == 8 * (2 * R * (24 + 20) + 2 * 8 * R)


def test_the_first_steps_are_adams_in_the_space() -> None:
    """§2.3, written out."""
    values, scale, lr, decay = parameters(), 2.5, 0.01, 0.1
    P, optimizer = values["lora_A"], optimizer_of(values, scale=scale)
    optimizer.param_groups[0]["weight_decay"] = decay
    expected, U = P.detach().clone(), torch.empty(0)
    M1 = M2 = torch.zeros(R, 24).double()
    for k in range(T):
        D = drawn(8, 24, seed=100 * k)
        if k == 0:
            U = torch.linalg.svd(D).U[:, :R]
        Z = U.T @ D
        M1, M2 = 0.9 * M1 + 0.1 * Z, 0.999 * M2 + 0.001 * Z * Z
        step = lr * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        expected = expected - step * scale * (U @ (M1 / (M2.sqrt() + 1e-6)))
        expected = expected * (1 - lr * decay)
    take(optimizer, values, 0, T)
    torch.testing.assert_close(P.detach(), expected, rtol=0, atol=1e-10)


def test_what_is_not_projected_gets_ordinary_adamw_without_the_scale() -> None:
    value, other = nn.Parameter(drawn(20, seed=1)), nn.Parameter(drawn(20, seed=1))
    own = ProjectedAdamW([{"params": [value]}], Projection(R, T, scale=9.0), lr=0.01)
    stock = torch.optim.AdamW([other], lr=0.01, weight_decay=0.0, eps=1e-14)
    for step in range(6):
        value.grad = drawn(20, seed=step)
        other.grad = value.grad.clone()
        own.step()
        stock.step()
    # Its ε stands beside a root that is not corrected, so it is a little larger.
    torch.testing.assert_close(value.detach(), other.detach(), rtol=0, atol=2e-4)


def test_a_waiting_parameter_counts_no_step() -> None:
    value = {"lora_A": nn.Parameter(drawn(8, 24))}
    optimizer, before = optimizer_of(value), value["lora_A"].detach().clone()
    value["lora_A"].grad = torch.zeros(8, 24).double()
    optimizer.step()
    assert torch.equal(value["lora_A"].detach(), before)
    assert (optimizer.refreshed, state_bytes(optimizer)) == (0, 0)
    take(optimizer, value, 1, 2)
    assert (optimizer.refreshed, optimizer.state[value["lora_A"]]["count"]) == (1, 1)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("sides", ["std", "full"])
def test_the_moments_are_kept_rotated_or_begun_again(sides: Any, bits: Any) -> None:
    found = {}
    for mode in ("keep", "rotate", "reset"):
        value = {"P": nn.Parameter(drawn(80, 120))}
        optimizer = optimizer_of(value, rank=70, sides=sides, on_refresh=mode, bits=bits)
        take(optimizer, value, 0, T)
        state = optimizer.state[value["P"]]
        old, before = projected_adamw.Basis(state["left"], state["right"]), optimizer._stored(state, *_like(state))
        kept = [moment.clone() for moment in before]
        value["P"].grad = torch.zeros(80, 120).double()  # a step that adds nothing of its own
        optimizer.step()
        new = projected_adamw.Basis(state["left"], state["right"])
        found[mode] = (old, new, kept, optimizer._stored(state, *_like(state)), state["age"])
    tolerance = 1e-9 if bits == 32 else 0.02
    for mode, (old, new, (first, second), (first_after, second_after), age) in found.items():
        expected = {"keep": first, "rotate": new.down(old.up(first)), "reset": torch.zeros_like(first)}[mode]
        largest = float(first.abs().max())
        torch.testing.assert_close(first_after, 0.9 * expected, rtol=0, atol=tolerance * largest)
        again = torch.zeros_like(second) if mode == "reset" else 0.999 * second
        torch.testing.assert_close(second_after, again, rtol=0, atol=tolerance * float(second.max()))
        assert age == (1 if mode == "reset" else T + 1)


def _like(state: dict[str, Any]) -> tuple[torch.Size, Tensor]:
    left, right = state["left"], state["right"]
    shape = torch.Size((80 if left is None else left.shape[1], 120 if right is None else right.shape[0]))
    return shape, torch.empty(0, dtype=torch.float64)


# 8 bits.


def test_codes_are_as_near_as_their_blocks_allow() -> None:
    value = drawn(3, 700, dtype=torch.float32) * torch.logspace(-6, 0, 700)
    signed = encode_signed(value)
    assert (signed.codes.dtype, signed.codes.shape, signed.scales.shape) == (torch.int8, (9, 256), (9, 1))
    for exact, stored, steps in (
        (value, decode_signed(signed, value.shape), 254),
        (value.abs(), decode_square(encode_square(value.square()), value.shape).sqrt(), 255),
    ):
        errors = functional.pad((stored - exact).abs().flatten(), (0, 204)).view(9, 256).amax(1)
        largest = functional.pad(exact.abs().flatten(), (0, 204)).view(9, 256).amax(1)
        assert bool((errors <= largest / steps * 1.0001).all())
    assert bool((decode_square(encode_square(value.square()), value.shape) > 0).all())
    zeros = torch.zeros(300)
    assert torch.equal(decode_signed(encode_signed(zeros), zeros.shape), zeros)
    assert torch.equal(decode_square(encode_square(zeros), zeros.shape), zeros)


def test_small_moments_stay_in_32_bits_and_large_ones_do_not() -> None:
    values = {"small": nn.Parameter(drawn(8, 1023).float()), "large": nn.Parameter(drawn(8, 1024).float())}
    optimizer = optimizer_of(values, bits=8)
    take(optimizer, values, 0, 3)
    small, large = (optimizer.state[value] for value in values.values())
    assert small["first"].dtype == torch.float32
    assert "first_codes" not in small
    assert (large["first_codes"].dtype, large["second_codes"].dtype) == (torch.int8, torch.uint8)
    assert "first" not in large
    projection = Projection(R, T, bits=8)
    assert [projection.in_8_bits(8, columns) for columns in (1023, 1024)] == [False, True]
    assert state_bytes(optimizer) == sum(projection.state_bytes(8, columns) for columns in (1023, 1024))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_stored_state_goes_on_to_the_bit_and_is_plain_tensors(bits: Any, tmp_path: Path) -> None:
    def fresh() -> tuple[dict[str, nn.Parameter], ProjectedAdamW]:
        values = {"a": nn.Parameter(drawn(8, 1100).float()), "b": nn.Parameter(drawn(30, 8).float())}
        return values, optimizer_of(values, bits=bits)

    values, optimizer = fresh()
    take(optimizer, values, 0, T + 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    kept = {name: value.detach().clone() for name, value in values.items()}
    take(optimizer, values, T + 2, 2 * T + 3)

    again, resumed = fresh()
    for name, value in again.items():
        value.data.copy_(kept[name])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take(resumed, again, T + 2, 2 * T + 3)
    for name, value in values.items():
        assert torch.equal(value, again[name]), name
    assert state_bytes(resumed) == state_bytes(optimizer)
