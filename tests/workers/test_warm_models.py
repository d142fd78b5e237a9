"""Base models stay in a worker's memory, bounded by bytes, and their jobs go where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts.base_model import inspect_base
from storage import jobs, models
from workers.warm_models import WarmModels, model_bytes

pytestmark = pytest.mark.timeout(120)


class Model:
    """Counts as a model of `size` bytes."""

    def __init__(self, size: int) -> None:
        import torch

        self._tensor = torch.zeros(size, dtype=torch.uint8)

    def parameters(self) -> list[Any]:
        return [self._tensor, self._tensor]  # shared, so counted once

    def buffers(self) -> list[Any]:
        return []


def get(warm: WarmModels, name: str, size: int, limit: int = 100, loads: list[str] | None = None) -> Any:
    def load() -> Any:
        if loads is not None:
            loads.append(name)
        return Model(size)

    return warm.get((name, "auto", "cpu"), limit, size, load)


def test_a_model_is_loaded_once_and_the_least_recently_used_goes_first() -> None:
    warm, loads = WarmModels(), list[str]()
    first = get(warm, "a", 40, loads=loads)
    get(warm, "b", 40, loads=loads)
    assert get(warm, "a", 40, loads=loads) is first
    assert warm.ids == ("a", "b")
    get(warm, "c", 40, loads=loads)
    assert warm.ids == ("c", "a")
    assert warm.bytes == 80
    assert loads == ["a", "b", "c"]


def test_room_is_made_before_the_next_one_is_loaded() -> None:
    warm, seen = WarmModels(), list[int]()
    get(warm, "a", 60)

    def load() -> Any:
        seen.append(warm.bytes)
        return Model(50)

    warm.get(("b", "auto", "cpu"), 100, 50, load)
    assert seen == [0]


def test_a_model_above_the_limit_is_used_and_not_kept() -> None:
    warm = WarmModels()
    get(warm, "small", 10)
    assert model_bytes(get(warm, "large", 101)) == 101
    assert warm.ids == ()
    get(warm, "none", 1, limit=0)
    assert warm.ids == ()


@pytest.fixture
def add_model(pool: Any) -> Any:
    """Registers a tiny random Llama under a name; returns its id."""

    def add(name: str, seed: int) -> str:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would leave a thread behind
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        folder: Path = pool.folder / "models" / name
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).save_pretrained(folder)
        with pool.database.write() as session:
            row, _ = models.add_model(session, inspect_base(folder))
            return row.id

    return add


@pytest.fixture
def warm_pool(pool: Any, torch_provider: Any) -> Any:
    pool.provider = torch_provider
    return pool


def submit(pool: Any, model_id: str) -> str:
    with pool.database.write() as session:
        return jobs.create_job(session, "use_base_model", {"model": model_id}, affinity=model_id).id


def start(pool: Any, **changes: Any) -> Any:
    kinds = {"use_base_model": "rank_kinds:use_base_model"}
    return pool.start(kinds=kinds, model_roots=(pool.folder / "models",), **changes)


def test_the_second_job_finds_its_model_in_memory(warm_pool: Any, add_model: Any, wait_until: Any) -> None:
    model_id = add_model("one", 1)
    supervisor = start(warm_pool)
    reports = [warm_pool.ended(submit(warm_pool, model_id)).result["report"] for _ in range(2)]
    assert [report["warm_before"] for report in reports] == [[], [model_id]]
    assert reports[0]["pid"] == reports[1]["pid"]
    assert reports[0]["logits"] == reports[1]["logits"]
    assert not reports[0]["training"]
    assert not reports[0]["gradients"]
    wait_until(lambda: supervisor.status()[0]["warm"] == [model_id], "the slot shows its model")


def test_with_no_bytes_nothing_stays(warm_pool: Any, add_model: Any) -> None:
    model_id = add_model("one", 1)
    start(warm_pool, warm_bytes=0)
    reports = [warm_pool.ended(submit(warm_pool, model_id)).result["report"] for _ in range(2)]
    assert [report["warm_before"] for report in reports] == [[], []]


def test_a_job_goes_to_the_slot_that_has_its_model(warm_pool: Any, add_model: Any, wait_until: Any) -> None:
    """Two slots, two models: whatever the order, no slot ever loads the second one."""
    first, second = add_model("one", 1), add_model("two", 2)
    supervisor = start(warm_pool, devices="cpu:2")
    wait_until(lambda: all(slot["state"] == "idle" for slot in supervisor.status()), "both slots are idle")
    for model_id in (first, second):
        assert warm_pool.ended(submit(warm_pool, model_id)).state == "succeeded"
        wait_until(lambda: all(slot["state"] == "idle" for slot in supervisor.status()), "both slots are idle")
    assert sorted(slot["warm"] for slot in supervisor.status()) == sorted([[first], [second]])
    for model_id in (second, second, first, second, first):
        report = warm_pool.ended(submit(warm_pool, model_id)).result["report"]
        assert report["warm_before"] == [model_id]
        wait_until(lambda: all(slot["state"] == "idle" for slot in supervisor.status()), "both slots are idle")


def test_a_model_outside_of_the_roots_is_refused(warm_pool: Any, add_model: Any) -> None:
    model_id = add_model("one", 1)
    kinds = {"use_base_model": "rank_kinds:use_base_model"}
    warm_pool.start(kinds=kinds, model_roots=(warm_pool.folder / "elsewhere",))
    job = warm_pool.ended(submit(warm_pool, model_id))
    assert (job.state, job.error["code"]) == ("failed", "invalid_request")
    assert "model roots" in job.error["detail"]
