"""The job kind "merge", from stored adapters to a stored adapter, in a real worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage import adapters
from storage.blobs import BlobStore
from workers.adapter_names import NAME_LIMIT, default_name
from workers.jobs.merge_inputs import LIBRARIES
from workers.kinds import KINDS

TOLERANCE = 1e-4


@pytest.fixture
def merge_pool(pool: Any, torch_provider: Any) -> Any:
    pool.provider = torch_provider
    return pool


def open_adapter(pool: Any, adapter_id: str, folder: Path) -> Any:
    from artifacts.adapter import Adapter

    blobs = BlobStore(pool.settings().blob_url)
    with pool.database.read() as session:
        files = adapters.get_adapter(session, adapter_id).files
    folder.mkdir()
    for entry in files:
        (folder / entry.path).symlink_to(blobs.materialize(entry.sha256, folder))
    return Adapter.open(folder)


def test_a_merge_stores_the_weighted_sum_with_its_recipe(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    first, second = add_adapter("a", 1), add_adapter("b", 2, rank=2)
    job_id = pool.submit(
        "merge",
        adapters=[{"id": first, "weight": 0.5}, {"id": second}],
        method="cat",
        parameters={"compute_dtype": "float64"},
    )
    pool.start(kinds=KINDS)
    job = pool.ended(job_id)
    assert job.error is None
    (merged_id,) = job.result["adapters"]

    deltas = {}
    for name, adapter_id in (("a", first), ("b", second), ("merged", merged_id)):
        opened = open_adapter(pool, adapter_id, pool.folder / name)
        deltas[name] = {path: (f.B.double() @ f.A.double()) * f.scaling for path, f in opened.items()}
    for path, delta in deltas["merged"].items():
        expected = 0.5 * deltas["a"][path] + deltas["b"][path]
        assert float((delta - expected).norm() / expected.norm()) < TOLERANCE

    with pool.database.read() as session:
        row = adapters.get_adapter(session, merged_id)
        history = adapters.lineage(session, merged_id)
    assert row.name == "merge of a + b (cat)"
    assert (row.origin, row.job_id, row.rank, row.base_model) == ("merge", job_id, 6, "example/base")
    recipes = {edge.parent_id: edge.recipe for edge in history.edges}
    assert recipes.keys() == {first, second}
    recipe = recipes[first]
    assert (recipe["weight"], recipes[second]["weight"]) == (0.5, 1.0)
    assert (recipe["position"], recipes[second]["position"]) == (0, 1)
    assert recipe["method"] == "cat"
    assert recipe["parameters"]["compute_dtype"] == "float64"
    assert recipe["parameters"]["missing_modules"] == "union"
    assert recipe["versions"].keys() == set(LIBRARIES) >= {"rankwise", "torch", "numpy"}
    assert all(recipe["versions"].values())
    assert [item["id"] for item in recipe["adapters"]] == [first, second]
    report = job.result["report"]
    assert (report["method"], report["rank"]) == ("cat", 6)


def test_lego_with_its_seed_is_recorded_and_names_can_be_given(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    ids = [add_adapter("a", 1), add_adapter("b", 2)]
    job_id = pool.submit(
        "merge",
        adapters=[{"id": adapter_id, "weight": 1.0} for adapter_id in ids],
        method="lego",
        parameters={"rank": 4, "seed": 7},
        name="mine",
    )
    pool.start(kinds=KINDS)
    job = pool.ended(job_id)
    assert job.error is None
    with pool.database.read() as session:
        row = adapters.get_adapter(session, job.result["adapters"][0])
        (edge, _) = adapters.lineage(session, row.id).edges
    assert (row.name, row.rank) == ("mine", 4)
    assert edge.recipe["seed"] == edge.recipe["parameters"]["seed"] == 7


def test_the_same_merge_again_gives_the_same_adapter(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    params = {
        "adapters": [{"id": add_adapter("a", 1)}, {"id": add_adapter("b", 2)}],
        "method": "svd",
        "parameters": {"rank": 4},
    }
    ids = [pool.submit("merge", **params) for _ in range(2)]
    pool.start(kinds=KINDS)
    first, second = [pool.ended(job_id) for job_id in ids]
    assert first.error is None
    assert first.result["adapters"] == second.result["adapters"]


def test_an_adapter_deleted_after_the_submission_fails_the_job(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    first, second = add_adapter("a", 1), add_adapter("b", 2)
    job_id = pool.submit("merge", adapters=[{"id": first}, {"id": second}], method="cat", parameters={})
    with pool.database.write() as session:
        adapters.delete_adapter(session, second)
    pool.start(kinds=KINDS)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "not_found")
    assert second in job.error["detail"]


def test_shapes_that_disagree_fail_the_job_with_the_plans_words(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    first, second = add_adapter("a", 1), add_adapter("b", 2, d_in=64)
    job_id = pool.submit("merge", adapters=[{"id": first}, {"id": second}], method="cat", parameters={})
    pool.start(kinds=KINDS)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "shape_mismatch")
    assert job.error["errors"]


def test_a_corrupt_blob_fails_the_job_and_publishes_nothing(merge_pool: Any, add_adapter: Any) -> None:
    pool = merge_pool
    first, second = add_adapter("a", 1), add_adapter("b", 2)
    with pool.database.read() as session:
        (entry,) = [f for f in adapters.get_adapter(session, first).files if f.path.endswith(".safetensors")]
    path = BlobStore(pool.settings().blob_url).materialize(entry.sha256, pool.folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    job_id = pool.submit("merge", adapters=[{"id": first}, {"id": second}], method="cat", parameters={})
    pool.start(kinds=KINDS)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "blob_corrupt")
    with pool.database.read() as session:
        assert {row.id for row in adapters.list_adapters(session).items} == {first, second}


def test_the_default_name_fits_whatever_the_adapters_are_called() -> None:
    assert default_name(["a", "b"], "lego") == "merge of a + b (lego)"
    long = default_name(["x" * 150, "y" * 150], "lego")
    assert len(long) == NAME_LIMIT
    assert long.endswith("… (lego)")
