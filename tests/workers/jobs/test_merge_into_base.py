"""A merge into the base model as a job: the result is a registered model that other jobs load."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from remote_servers import COMMIT, FileServer, add_repository
from transformers import AutoModelForCausalLM

from app.recipes import recipe_of_model
from artifacts.base_model import BaseModelRef, inspect_base
from artifacts.errors import AttemptCancelled, DiskFull, RemoteUnavailable, RequestInvalid
from storage import made_models, models
from storage.blobs import BlobStore
from workers import hub_models
from workers.base_models import ModelSource
from workers.hub_models import local_folder
from workers.kinds import KINDS

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
SECONDS = 200  # transformers is imported for the first time
IDS = torch.arange(1, 9)[None]


def never() -> None:
    """No stop is asked for."""


def fetched(pool: Any, model_id: str, folder: Path) -> Path:
    blobs = BlobStore(pool.settings().blob_url)
    folder.mkdir()
    with pool.database.read() as session:
        made = made_models.made_model(session, model_id)
        assert made is not None
        for file in made.files:
            (folder / file.path).symlink_to(blobs.materialize(file.sha256, folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_the_merged_model_is_registered_and_the_base_of_a_training(
    train_pool: Any, add_adapter: Any, add_dataset: Any, base_id: str, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    pool = train_pool
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": inspect_base(tiny_base).name}
    ids = [add_adapter("a", 1, **sides), add_adapter("b", 2, **sides)]
    wanted = {
        "adapters": [{"id": ids[0], "weight": 0.05}, {"id": ids[1], "weight": -0.02}],
        "method": "cat",
        "parameters": {},
    }
    plain = pool.submit("merge", **wanted)
    job_id = pool.submit("merge", **wanted, output="base", base_model=base_id, name="both inside")
    again = pool.submit("merge", **wanted, output="base", base_model=base_id, name="other name")
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    job = pool.ended(job_id, seconds=SECONDS)
    assert job.error is None
    assert (job.result["adapters"], job.result["images"]) == ([], [])
    (model_id,) = job.result["models"]
    assert pool.ended(again, seconds=SECONDS).result["models"] == [model_id]  # the same weights are the same model
    assert job.result["report"]["base"]["rounding"] < 1e-5
    with pool.database.read() as session:
        row = models.get_model(session, model_id)
        made = made_models.made_model(session, model_id)
    assert (row.name, row.source, row.architecture) == ("both inside", "files", "LlamaForCausalLM")
    assert made is not None
    assert made.recipe["base_model"]["id"] == base_id
    assert [item["id"] for item in made.recipe["adapters"]] == ids
    assert {file.path for file in made.files} >= {"config.json", "model.safetensors", "tokenizer.json"}

    folder = fetched(pool, model_id, tmp_path / "model")
    (adapter_id,) = pool.ended(plain, seconds=SECONDS).result["adapters"]
    _, directory = _adapter(pool, adapter_id, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted_logits = logits(PeftModel.from_pretrained(base, directory))
    found = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert float((found - wanted_logits).abs().max()) < 1e-4 * float(wanted_logits.abs().max())
    assert float((found - before).abs().max()) > 1e-2

    trained = pool.submit(
        "train",
        method="lora",
        base_model=model_id,
        dataset=add_dataset(),
        task="causal-lm",
        parameters={"rank": 2},
        training={"steps": 1, "batch_size": 2},
        evaluation={"validation_fraction": 0.0},
        seed=0,
    )
    assert pool.ended(trained, seconds=SECONDS).error is None


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the tiny model in it, at a commit; nothing else is reached."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_base, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_model_of_the_hub_is_fetched_and_its_commit_kept(
    train_pool: Any,
    run_here: Any,
    add_adapter: Any,
    base_id: str,
    tiny_base: Path,
    hub: Path,
    revision: str | None,
) -> None:
    sides = {"d_in": 32, "d_out": 32, "modules": MODULES, "base_model": "acme/tiny"}
    wanted = {"adapters": [{"id": add_adapter("a", 1, **sides), "weight": 0.05}], "method": "cat", "parameters": {}}
    ref = BaseModelRef(name="acme/tiny", source="hub", location="acme/tiny", revision=revision)
    with train_pool.database.write() as session:
        on_hub = models.add_model(session, ref)[0].id
    into = {**wanted, "output": "base", "dtype": "float32"}
    (key,) = run_here("merge", **into, base_model=on_hub)["models"]
    # the same weights are the same model
    assert run_here("merge", **into, base_model=base_id, model_roots=(str(tiny_base.parent),))["models"] == [key]
    with train_pool.database.read() as session:
        made = made_models.made_model(session, key)
        assert made is not None
        assert made.recipe["base_model"] == {
            "id": on_hub, "name": "acme/tiny", "weights_digest": None, "commit": COMMIT,
        }  # fmt: skip
        assert {file.path for file in made.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
        recipe = recipe_of_model(session, key)
    assert recipe.reproducible is (revision is not None)
    assert all(COMMIT in reason for reason in recipe.because)


@pytest.fixture
def hub_server(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A hub on loopback that has the tiny model beside code, pickles, an adapter and weights that are not its own."""
    from huggingface_hub import close_session, constants

    server = FileServer(headers={"x-repo-commit": COMMIT})
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    files |= dict.fromkeys(
        (
            "modeling_tiny.py",
            "pytorch_model.bin",
            "onnx/model.safetensors",
            "README.md",
            "model.fp16.safetensors",
            "adapter_model.safetensors",
            "consolidated.safetensors",
        ),
        b"not read",
    )
    add_repository(server, "acme/tiny", files)
    told = {"id": "acme/tiny", "sha": COMMIT, "private": False, "tags": [], "siblings": []}
    server.files["/api/models/acme/tiny/revision/main"] = json.dumps(told).encode()
    tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
    server.files[f"/api/models/acme/tiny/tree/{COMMIT}"] = json.dumps(tree).encode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    close_session()
    server.close()


def test_only_what_a_model_is_made_of_is_fetched_from_the_hub(tiny_base: Path, hub_server: FileServer) -> None:
    folder = local_folder(ModelSource("tiny", "acme/tiny", None, 0), never)
    assert folder.name == COMMIT
    fetched = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    assert local_folder(ModelSource("tiny", str(tiny_base), None, 0), never) == tiny_base
    with pytest.raises(RequestInvalid, match="can not be had from the hub: it answered 404"):
        local_folder(ModelSource("other", "acme/other", None, 0), never)


def test_of_weights_in_parts_those_of_the_index_are_fetched(tiny_base: Path, hub_server: FileServer) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "model.fp16.safetensors"}}).encode()
    resolved = f"/acme/tiny/resolve/{COMMIT}/"
    hub_server.files |= {
        f"{resolved}model.safetensors.index.json": index,
        f"{resolved}one.safetensors": b"part",
    }
    listing = f"/api/models/acme/tiny/tree/{COMMIT}"
    tree = json.loads(hub_server.files[listing])
    for name in ("model.safetensors.index.json", "one.safetensors"):
        size = len(hub_server.files[resolved + name])
        tree.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
    hub_server.files[listing] = json.dumps(tree).encode()
    folder = local_folder(ModelSource("tiny", "acme/tiny", None, 0), never)
    assert {path.name for path in folder.glob("*.safetensors")} == {"one.safetensors", "model.fp16.safetensors"}


def test_a_hub_that_is_away_is_no_fault_of_the_request(hub_server: FileServer) -> None:
    hub_server.statuses += [503] * 20
    with pytest.raises(RemoteUnavailable) as caught:
        local_folder(ModelSource("tiny", "acme/tiny", None, 0), never)
    assert hub_server.url not in caught.value.detail
    assert "503" in caught.value.detail


def test_a_download_that_does_not_fit_the_disk_is_not_begun(
    hub_server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_models, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=10)))
    with pytest.raises(DiskFull, match="and 10 are free"):
        local_folder(ModelSource("tiny", "acme/tiny", None, 0), never)
    assert not [path for path, _ in hub_server.got if path.endswith(".safetensors")]


def test_a_disk_that_fills_up_meanwhile_is_told_as_that(
    hub_server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(DiskFull, match="'tiny' in the hub's cache"):
        local_folder(ModelSource("tiny", "acme/tiny", None, 0), never)


def test_a_job_that_is_to_stop_does_not_wait_for_the_hub(
    hub_server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, left = threading.Event(), threading.Event()

    def silent(*args: Any, **options: Any) -> str:
        released.wait(60)
        left.set()
        return "/nowhere"

    def stop() -> None:
        raise AttemptCancelled("stop")

    monkeypatch.setattr("huggingface_hub.snapshot_download", silent)
    try:
        with pytest.raises(AttemptCancelled):
            local_folder(ModelSource("tiny", "acme/tiny", None, 0), stop)
        assert not left.is_set()
    finally:
        released.set()
    assert left.wait(60)


def test_a_model_that_the_hub_does_not_give_is_told(
    train_pool: Any, run_here: Any, add_adapter: Any, hub: Path
) -> None:
    wanted = {"adapters": [{"id": add_adapter("a", 1)}], "method": "cat", "parameters": {}, "output": "base"}
    with train_pool.database.write() as session:
        ref = BaseModelRef(name="acme/other", source="hub", location="acme/other")
        other = models.add_model(session, ref)[0].id
        here = models.add_model(session, BaseModelRef(name="acme/tiny", source="hub", location="acme/tiny"))[0].id
    with pytest.raises(RequestInvalid, match="can not be had from the hub") as caught:
        run_here("merge", **wanted, base_model=other)
    assert caught.value.errors[0].pointer == "/base_model"
    (hub / "snapshots" / COMMIT / "model_index.json").write_text("{}")
    with pytest.raises(RequestInvalid, match="diffusers pipeline"):
        run_here("merge", **wanted, base_model=here)


def _adapter(pool: Any, adapter_id: str, folder: Path) -> tuple[Any, Path]:
    from storage import adapters

    blobs = BlobStore(pool.settings().blob_url)
    folder.mkdir()
    with pool.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
        for file in row.files:
            (folder / file.path).symlink_to(blobs.materialize(file.sha256, folder))
    return row, folder
