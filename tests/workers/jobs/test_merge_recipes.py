"""What the recipe of a merge gives, posted again: the same bytes, of every method at every rule and of a base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes import recipe_of, recipe_of_model
from app.schemas.common import as_json
from app.schemas.merge import MergeParams
from artifacts.base_model import inspect_base
from merge.catalog import METHODS
from storage import adapters, database, retirement

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
RULES = {"core_space": ("sum", "ties", "dare", "tsv", "iso"), "knots": ("sum", "ties", "dare", "dare_ties")}
CANDIDATES: list[dict[str, Any]] = [
    {"method": name, "parameters": {"scale": 0.5, "norm_equalize": "module", **rule}}
    for name in METHODS
    for rule in ([{"rule": rule} for rule in RULES[name]] if name in RULES else [{}])
]


def files_of(pool: Any, adapter_id: str) -> list[tuple[str, str]]:
    with pool.database.read() as session:
        return [(file.path, file.sha256) for file in adapters.get_adapter(session, adapter_id).files]


@pytest.mark.parametrize("part", [0, 1])
def test_of_every_method(pool: Any, run_here: Any, add_adapter: Any, part: int) -> None:
    """The winners of a comparison; the recipe of each is a plain merge, in which every default is written out."""
    ids = [add_adapter("a", 1), add_adapter("b", 2, rank=2)]
    pair = [{"id": ids[0], "weight": 0.75}, {"id": ids[1], "weight": 0.5}]
    candidates = CANDIDATES[part::2]
    compared = run_here("merge_compare", adapters=pair, candidates=candidates, publish="all", name="m")
    made: dict[int, str] = {row["adapter"]: row["label"] for row in compared["report"]["candidates"]}
    # rules that agree on two adapters give one adapter
    assert len(set(compared["adapters"])) > len(candidates) // 2
    for place, key in enumerate(compared["adapters"]):
        with pool.database.read() as session:
            if adapters.get_adapter(session, key, deleted=True).deleted_at is not None:
                continue
            found = recipe_of(session, key)
        assert (found.reproducible, found.because) == (True, []), made[place]
        assert found.call is not None
        assert found.call.path == "/merge"
        options = METHODS[found.call.body["method"]].options
        assert set(found.call.body["parameters"]) == set(options.model_fields)
        before = files_of(pool, key)
        with pool.database.write() as session:
            adapters.delete_adapter(session, key)
        (again,) = run_here("merge", **as_json(MergeParams.model_validate(found.call.body)))["adapters"]
        assert again != key
        assert files_of(pool, again) == before, made[place]


def test_of_a_merge_into_the_base_model(
    train_pool: Any, run_here: Any, add_adapter: Any, base_id: str, tiny_base: Path, tmp_path: Path
) -> None:
    pool = train_pool
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name}
    ids = [add_adapter("a", 1, **sides), add_adapter("b", 2, **sides)]
    pair = [{"id": ids[0], "weight": 0.05}, {"id": ids[1], "weight": -0.02}]
    wanted = {"adapters": pair, "method": "svd", "parameters": {"rank": 2}, "output": "base", "base_model": base_id}
    roots = (str(tiny_base.parent),)

    def made_by(body: dict[str, Any]) -> str:
        """A model's id: the same weights are the same model."""
        (key,) = run_here("merge", model_roots=roots, **body)["models"]
        return str(key)

    key = made_by({**wanted, "dtype": "bfloat16", "force": True, "name": "both"})
    assert key != made_by({**wanted, "dtype": "float32"})
    with pool.database.read() as session:
        found = recipe_of_model(session, key)
        registered = recipe_of_model(session, base_id)
    assert (registered.call, registered.reproducible) == (None, False)
    assert "no job made it" in registered.because[0]
    assert (found.reproducible, found.because) == (True, [])
    assert found.versions["torch"] == torch.__version__
    assert found.call is not None
    body = found.call.body
    assert (body["output"], body["base_model"], body["dtype"], body["force"]) == ("base", base_id, "bfloat16", True)
    assert (body["name"], body["parameters"]["rank"]) == ("both", 2)
    assert made_by(as_json(MergeParams.model_validate(body))) == key
    weights = tiny_base / "model.safetensors"
    before = weights.stat()
    away = weights.rename(tmp_path / "away.safetensors")
    try:
        with pool.database.read() as session:
            gone = recipe_of_model(session, key)
        os.utime(away, (before.st_atime, before.st_mtime + 10**6))
        away.rename(weights)
        with pool.database.read() as session:
            changed = recipe_of_model(session, key)
    finally:
        if away.exists():
            away.rename(weights)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    for found, words in (
        (gone, "are not in its folder any more"),
        (changed, "were written to after it was registered"),
    ):
        assert (found.reproducible, found.because) == (False, [f"the weights of the base model {base_id} {words}"])
    with pool.database.write() as session:
        for adapter_id in ids:
            adapters.delete_adapter(session, adapter_id)
        retirement.update_model(session, base_id, removed_at=database.now(session))
        found = recipe_of_model(session, key)
    assert found.reproducible is False
    assert found.because == [
        *(f"the adapter {adapter_id} was deleted" for adapter_id in ids),
        f"the base model {base_id} was removed",
    ]
