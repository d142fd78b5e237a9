"""The job kind "merge_compare", from stored adapters to a table and the stored winners."""

from __future__ import annotations

from typing import Any

import pytest

from storage import adapters
from workers.kinds import KINDS

CANDIDATES = [
    {"method": "svd", "parameters": {"rank": 1}},
    {"method": "svd", "parameters": {"rank": 6}, "label": "wide"},
    {"method": "cat"},
]


@pytest.fixture
def merge_pool(pool: Any, torch_provider: Any) -> Any:
    pool.provider = torch_provider
    return pool


def test_a_comparison_publishes_what_was_asked_for(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    ids = [add_adapter("a", 1), add_adapter("b", 2)]
    wanted = {"adapters": [{"id": key, "weight": 0.5} for key in ids], "candidates": CANDIDATES}
    none = pool.submit("merge_compare", **wanted)
    best = pool.submit("merge_compare", **wanted, publish="best", name="mine")
    every = pool.submit("merge_compare", **wanted, publish="all", name="mine")
    alone = pool.submit("merge", adapters=wanted["adapters"], method="cat", parameters={})
    pool.start(kinds=KINDS)
    jobs = {name: pool.ended(job) for name, job in {"none": none, "best": best, "all": every, "alone": alone}.items()}
    assert [job.error for job in jobs.values()] == [None] * 4

    assert jobs["none"].result["adapters"] == []
    report = jobs["all"].result["report"]
    assert report["ranking"] == ["cat", "wide", "svd"]
    assert [row["label"] for row in report["candidates"]] == ["svd", "wide", "cat"]
    assert [row["adapter"] for row in report["candidates"]] == [0, 1, 2]
    assert [row["adapter"] for row in jobs["best"].result["report"]["candidates"]] == [None, None, 0]
    # the same merge alone, and as a winner, is one adapter
    (winner,) = jobs["best"].result["adapters"]
    assert winner == jobs["all"].result["adapters"][2] == jobs["alone"].result["adapters"][0]
    with pool.database.read() as session:
        names = [adapters.get_adapter(session, key).name for key in jobs["all"].result["adapters"]]
        edges = adapters.lineage(session, jobs["all"].result["adapters"][1]).edges
    assert names == ["mine (svd)", "mine (wide)", "mine"]
    assert {edge.recipe["parameters"]["rank"] for edge in edges} == {6}
