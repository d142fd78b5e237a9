"""The benchmark of composition runs, and counts as the method's description does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import compose
from benchmarks.compose_counts import Counted, peak_bytes, sd15_truncated_share


@pytest.mark.parametrize(
    ("steps", "updates", "repeats", "forward", "backward"),
    [(100, 50, 60, 960, 660), (50, 25, 60, 660, 510)],
)
def test_the_authors_count(steps: int, updates: int, repeats: int, forward: int, backward: int) -> None:
    assert compose.official_count(3, steps, updates, repeats) == Counted(forward, 0, backward)


def test_a_truncated_pass_counts_by_its_share() -> None:
    assert Counted(10, 4, 6).weighed(0.5) == 15


def test_in_stable_diffusion_half_of_a_pass_is_behind_the_maps() -> None:
    assert 0.45 < sd15_truncated_share() < 0.55


def test_memory_is_the_most_that_is_alive_at_a_time() -> None:
    given = torch.ones(1000)

    def work() -> torch.Tensor:
        first = given + 1
        second = first * 2
        del first
        view = second.view(10, 100)
        view.add_(1)
        return second + 1

    assert peak_bytes(work) == 8000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--steps 4 --repeats 1 --rounds 1 --threads 1 --clock cpu"
    compose.main([*sizes.split(), "--results", str(tmp_path)])
    found = {item["name"]: item for item in json.loads((tmp_path / "compose.json").read_text())["figures"]}
    goals = {item["goal"] for item in found.values()} - {None}
    assert goals == {0.6, 1.15, 1.3, 3.2, 50.0}
    one, every = (
        found[f"{way}: peak memory of an update, all branches × one"]
        for way in ("one graph at a time", "all graphs at once")
    )
    assert one["passed"]
    assert every["value"] > 2
    held, again = (found[f"{way}: forward samples × the authors'"]["value"] for way, _ in compose.WAYS)
    assert held < again
    assert "goal" in capsys.readouterr().out
