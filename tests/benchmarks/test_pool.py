"""Every section of the benchmark of the pool runs, with sizes that say nothing of speed, and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pool, pool_cluster
from benchmarks.pool_cluster import Cluster
from benchmarks.pool_figures import Figure

SQLITE, POSTGRESQL = "--databases sqlite", "--databases postgresql"
slow = [pytest.mark.slow]
postgres = [pytest.mark.postgres]
TINY = [
    pytest.param("growth", f"--rows 300 --rounds 1 {SQLITE}"),
    pytest.param("growth", f"--rows 300 --rounds 1 {POSTGRESQL}", marks=postgres),
    pytest.param("throughput", f"--jobs 5 {SQLITE}", marks=slow),
    pytest.param("throughput", f"--jobs 5 {POSTGRESQL}", marks=postgres + slow),
    pytest.param("cluster", "--slots 16 --cluster-jobs 96 --job-seconds 0.4 --supervisors 2", marks=postgres + slow),
    pytest.param("claims", "--claims 40", marks=postgres + slow),
    pytest.param("latency", "--repeats 2 --without-ray", marks=slow),
    pytest.param("latency", "--repeats 2", marks=[*slow, pytest.mark.ray]),
    pytest.param("memory", "", marks=slow),
]


def run(section: str, options: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """The goals that depend on speed may be missed on a machine with other work, so the exit code is not looked at."""
    pool.main([section, *options.split(), "--results", str(folder)])
    shown = capsys.readouterr().out
    document = json.loads((folder / f"pool_{section}.json").read_text())
    figures: list[dict[str, object]] = document["figures"]
    assert document["section"] == section
    assert all(str(figure["name"]) in shown for figure in figures)
    return figures


@pytest.mark.parametrize(("section", "options"), TINY)
def test_a_section_runs(section: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(section, options, tmp_path, capsys)
    assert any(figure["goal"] is not None for figure in figures)
    if section == "claims":
        assert [figure["value"] for figure in figures[:2]] == [0, 0]


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pool.parse(["speed"])
    assert "there is no section speed" in capsys.readouterr().err


def test_a_figure_knows_whether_it_reached_its_goal() -> None:
    assert Figure("time", 50.0, "ms", 60.0).passed is True
    assert Figure("time", 70.0, "ms", 60.0).passed is False
    assert Figure("rate", 70.0, "jobs/s", 60.0, at_most=False).passed is True
    assert Figure("rate", 50.0, "jobs/s", 60.0, at_most=False).passed is False
    assert Figure("size", 1.0, "MB").passed is None


def test_the_busy_share_counts_only_the_time_that_jobs_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots, from when both have a job (at 1) to when the last job begins (at 9): one idles from 5 to 9."""
    runs = [("a", "j1", 0.0, 5.0), ("b", "j2", 1.0, 9.0), ("a", "j3", 9.0, 12.0)]
    report = dict.fromkeys(("thread_seconds", "process_seconds", "workers_seconds"), 1.0)
    found = {
        "runs": runs,
        "reports": [report | {"claim_seconds": [0.01]}],
        "seconds": 12.0,
        "postgres_seconds": 1.0,
        "transactions": 10,
        "waits": {},
    }
    monkeypatch.setattr(pool_cluster, "simulate", lambda _size: found)
    busy, gap, *_ = pool_cluster.cluster(Cluster(slots=2, jobs=3, seconds=5.0, supervisors=1))
    assert busy.value == pytest.approx(100 * (4 + 8) / 16)
    assert gap.value == pytest.approx(4000)
