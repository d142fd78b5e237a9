"""What is formed and used in panels, against the same in tiles and in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge import rows, rules, strip_loops, strips
from merge.brackets import Tally
from merge.entry_rule import EntryRule

WEIGHTS = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


class TestStrips:
    @pytest.mark.parametrize(("rows", "terms", "width"), [(64, 4096, 32), (16, 1100, 48), (8, 5, 16)])
    def test_a_projection_is_the_two_products(self, rows: int, terms: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        M, Q = torch.randn(rows, terms, generator=generator), torch.randn(terms, width, generator=generator)
        block = torch.full((-(-terms // 32), rows, 32), float("nan"))
        strips.write(block, M)
        Y, across = torch.empty(rows, width), torch.randn(len(block), width, 32, generator=generator)
        before = across.transpose(1, 2).flatten(0, 1)[:terms].clone()
        padded = torch.cat([Q, torch.zeros(len(block) * 32 - terms, width)])
        energy = strip_loops.project(block.numpy(), padded.numpy(), Y.numpy(), across.numpy())
        assert near(Y.double(), M.double() @ Q.double(), 1e-6)
        Z = across.transpose(1, 2).flatten(0, 1)[:terms]
        assert near(Z.double(), before.double() + M.double().T @ Y.double(), 1e-6)
        assert energy == pytest.approx(float(M.double().square().sum()), rel=1e-6)

    @pytest.mark.parametrize("shape", [(64, 64), (5, 33), (64, 20)])
    def test_what_is_written_is_read(self, shape: tuple[int, int]) -> None:
        X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        block = strips.new_block(shape[1], X).fill_(float("nan"))
        strips.write(block, X)
        assert torch.equal(strips.read(block, *shape), X)
        assert float(block.square().sum()) == pytest.approx(float(X.square().sum()))

    @pytest.mark.parametrize("d_in", [50, 64])
    @pytest.mark.parametrize("election", [None, "total", "frequency"])
    @pytest.mark.parametrize("kind", ["all", "window", "keys", "variance"])
    def test_what_is_merged_in_panels_is_what_the_rule_makes_of_a_tile(
        self, kind: str, election: rules.Election | None, d_in: int, stack_of: Any, random_adapters: Any
    ) -> None:
        """Bit for bit."""
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 4, 9], d_out=70, d_in=d_in)))
        votes, shares = WEIGHTS.flip(0), WEIGHTS.abs()
        changes: dict[str, Any] = {
            "window": {"window": rules.Window(WEIGHTS.abs(), 4 * WEIGHTS.abs())},
            "keys": {"keys": np.array([1, 2, 3], np.uint64), "density": 0.4},
            "variance": {"sizes": WEIGHTS, "least": 3.0},
        }.get(kind, {})
        rule = EntryRule(WEIGHTS, votes, shares, election, **changes)
        whole = torch.cat([tile.clone() for _, _, tile in deltas.tiles(whole_rows=True)], 1)
        expected = rule(0, 0, whole)
        assert float((expected == 0).float().mean()) < 0.9
        block = strips.new_block(d_in, whole)
        for row in (0, 64):
            deltas.merged(rule, row, block.fill_(float("nan")))
            here = expected[row : row + 64]
            assert torch.equal(strips.read(block, *here.shape), here)
            assert float(block.abs().sum()) == pytest.approx(float(here.abs().sum()), rel=1e-5)  # and zeros beyond

    def test_energies_are_those_of_the_places_that_vary_most(self, stack_of: Any, random_adapters: Any) -> None:
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 4, 9], d_out=700, d_in=50)))
        whole = torch.cat([tile.clone() for _, _, tile in deltas.tiles(whole_rows=True)], 1)
        border = float(rules.variance(whole, WEIGHTS).median())
        expected = (whole * (rules.variance(whole, WEIGHTS) >= border)).double().square().sum((1, 2))
        torch.testing.assert_close(deltas.energies(WEIGHTS, border), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("room", [5000, 10])
    def test_a_tally_tells_the_same_energies(
        self, room: int, stack_of: Any, random_adapters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or none, when there is no room for it."""
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 4, 9], d_out=700, d_in=50)))
        whole = torch.cat([tile.clone() for _, _, tile in deltas.tiles(whole_rows=True)], 1)
        monkeypatch.setattr(rows, "SORTED", 100)
        tally = Tally.of(3, room)
        assert not tally.complete
        (border,), *_ = rows.largest(deltas, rows.Variance(WEIGHTS, tally), [[7000]])
        chosen = rules.variance(whole, WEIGHTS) >= border
        assert int(chosen.sum()) == 7000
        assert tally.complete == (room == 5000)
        if tally.complete:
            assert int(tally.listed[0]) > 10
            with monkeypatch.context() as changed:
                changed.setattr(strip_loops, "energies", None)
                found = deltas.energies(WEIGHTS, border, tally)
        else:
            found = deltas.energies(WEIGHTS, border, tally)
        torch.testing.assert_close(found, (whole * chosen).double().square().sum((1, 2)), rtol=1e-6, atol=0)


class TestForming:
    def test_the_entries_are_those_of_the_products(self, stack_of: Any, random_adapters: Any) -> None:
        pairs = random_adapters([1, 5, 16], d_out=71, d_in=149)
        deltas = rows.DeltaRows.of(stack_of(pairs))
        found = torch.zeros(3, 71, 149)
        for row, column, tile in deltas.tiles():
            found[:, row : row + tile.shape[1], column : column + tile.shape[2]] = tile
        exact = torch.stack([B.double() @ A.double() for A, B in zip(deltas.A, deltas.B, strict=True)])
        assert near(found.double(), exact, 1e-6)

    def test_bits_do_not_depend_on_how_the_matrix_is_cut(
        self, stack_of: Any, random_adapters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On the edges of a tile single entries are formed, elsewhere panels."""
        deltas = rows.DeltaRows.of(stack_of(random_adapters([3, 7], d_out=70, d_in=250)))
        (_, _, whole), *_ = deltas.tiles(range(1, 61), whole_rows=True)
        whole = whole.clone()
        for name, number in (("TILE_BYTES", 1), ("TILE_COLUMNS", 37), ("TILE_ROWS", 9)):
            monkeypatch.setattr(rows, name, number)
        seen = 0
        for row, column, tile in deltas.tiles(range(1, 61)):
            height, width = tile.shape[1:]
            assert torch.equal(tile, whole[:, row - 1 : row - 1 + height, column : column + width])
            seen += height * width
        assert seen == 60 * 250
