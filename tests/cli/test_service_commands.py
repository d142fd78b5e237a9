"""The commands that talk to a service, against a real one in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from app.cli.client import Client
from app.cli.progress import watch

pytestmark = pytest.mark.usefixtures("remote")
NO_SUCH = "0" * 32


@pytest.fixture
def ids(cli: Callable[..., Any], adapters: tuple[Path, Path]) -> tuple[str, str]:
    """Both adapters uploaded; the same content in every test, so the same ids."""
    first, second = (cli("adapters", "add", folder, "--json").json["id"] for folder in adapters)
    return first, second


def test_add_says_what_is_new_and_what_was_there(
    cli: Callable[..., Any], tmp_path: Path, adapters: tuple[Path, Path]
) -> None:
    copy = shutil.copytree(adapters[0], tmp_path / "copy")
    arguments = ("--name", "fresh", "--description", "a line", "--tag", "one", "--tag", "two")
    config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] = 1.5
    (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    added = cli("adapters", "add", copy, *arguments)
    assert added.code == 0, added.err
    assert "added" in added.out
    again = cli("adapters", "add", copy, "--name", "other")
    assert again.code == 0
    assert "was there" in again.out
    found = cli("adapters", "list", "--name", "fresh", "--tag", "two", "--json").json["items"]
    assert [(item["name"], item["description"], item["tags"]) for item in found] == [
        ("fresh", "a line", ["one", "two"])
    ]


def test_add_names_an_adapter_after_its_folder(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    assert cli("adapters", "get", ids[0], "--json").json["name"] == "first"


def test_several_at_once(cli: Callable[..., Any], adapters: tuple[Path, Path], ids: tuple[str, str]) -> None:
    result = cli("adapters", "add", *adapters, "--json")
    assert [item["id"] for item in result.json] == list(ids)
    assert cli("adapters", "add", *adapters, "--name", "one-name").code == 2


def test_a_refused_upload_shows_the_problem(cli: Callable[..., Any], adapters: tuple[Path, Path]) -> None:
    weights = adapters[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = cli("adapters", "add", adapters[0], "--json")
    assert result.code == 1
    assert result.json["code"] == "file_broken"
    assert "request id" in result.err


def test_list_pages(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    page = cli("adapters", "list", "--limit", "1", "--json").json
    assert len(page["items"]) == 1
    rest = cli("adapters", "list", "--limit", "200", "--cursor", page["next"], "--json").json
    assert page["items"][0]["id"] not in {item["id"] for item in rest["items"]}
    human = cli("adapters", "list", "--limit", "1")
    assert page["items"][0]["id"] in human.out
    assert f"--cursor {page['next']}" in human.err


def test_get_shows_files_and_report(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    result = cli("adapters", "get", ids[0])
    assert result.code == 0
    for text in (ids[0], "acme/tiny", "adapter_model.safetensors", "sha256"):
        assert text in result.out


def test_an_unknown_adapter(cli: Callable[..., Any]) -> None:
    result = cli("adapters", "get", f"adp_{NO_SUCH}", "--json")
    assert result.code == 1
    assert result.json["code"] == "not_found"


def test_download_gives_the_folder_back(
    cli: Callable[..., Any], adapters: tuple[Path, Path], ids: tuple[str, str], tmp_path: Path
) -> None:
    result = cli("adapters", "download", ids[0], "-o", tmp_path / "got", "--json")
    assert result.code == 0, result.err
    folder = Path(result.json["path"])
    assert folder.parent == tmp_path / "got"
    original = (adapters[0] / "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == original
    assert (folder / "adapter_config.json").is_file()
    again = cli("adapters", "download", ids[0], "-o", tmp_path / "got", "--json")
    assert again.code == 1
    assert again.json["code"] == "exists"
    assert list((tmp_path / "got").iterdir()) == [folder], "nothing partial is left"


def test_download_as_zip_and_as_one_file(cli: Callable[..., Any], ids: tuple[str, str], tmp_path: Path) -> None:
    packed = cli("adapters", "download", ids[0], "-o", tmp_path, "--zip", "--json").json["path"]
    assert Path(packed).read_bytes()[:2] == b"PK"
    single = cli("adapters", "download", ids[0], "-o", tmp_path, "--format", "safetensors", "--json").json["path"]
    assert b"lora_adapter_metadata" in Path(single).read_bytes()


def test_a_rank_is_downloaded_or_cut_from_the_folder(
    cli: Callable[..., Any], adapters: tuple[Path, Path], ids: tuple[str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters[0], tmp_path / "nested")
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"rankwise_dylora": '{"ranks":[1,3],"scale_mode":"alpha_over_b"}'})
    nested = cli("adapters", "add", folder, "--json").json
    assert nested["ranks"] == [1, 3]
    assert "1, 3" in cli("adapters", "get", nested["id"]).out
    found = cli("adapters", "download", nested["id"], "-o", tmp_path / "got", "--rank", "1", "--json")
    assert found.code == 0, found.err
    cut = cli("adapters", "cut", folder, "--rank", "1", "-o", tmp_path / "cut", "--json")
    assert cut.json == {"path": str(tmp_path / "cut"), "rank": 1}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path(found.json["path"]) / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 1
    again = cli("adapters", "cut", folder, "--rank", "1", "-o", tmp_path / "cut", "--json")
    assert (again.code, again.json["code"]) == (1, "exists")
    for command in (("download", nested["id"]), ("cut", folder)):
        refused = cli("adapters", *command, "-o", tmp_path / f"no-{command[0]}", "--rank", "2", "--json")
        assert (refused.code, refused.json["code"]) == (1, "invalid_request")
    plain = cli("adapters", "download", ids[0], "-o", tmp_path / "got", "--rank", "1", "--dtype", "bfloat16", "--json")
    assert json.loads((Path(plain.json["path"]) / "adapter_config.json").read_text())["r"] == 1
    other = cli("adapters", "download", ids[0], "-o", tmp_path / "got", "--format", "kohya", "--json")
    assert (other.code, other.json["errors"][0]["pointer"]) == (1, "/query/format")
    assert cli("adapters", "cut", tmp_path / "none", "--rank", "1", "-o", tmp_path / "x", "--json").code == 1


def test_whether_an_engine_loads_it(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    found = cli("adapters", "compatibility", ids[0], "--engine", "vllm")
    assert (found.code, "vllm loads it" in found.out) == (0, True)
    refused = cli("adapters", "compatibility", ids[0], "--engine", "kohya", "--json")
    assert (refused.code, refused.json["findings"][0]["rule"]) == (1, "kohya-names")


def test_merge_by_id_is_followed_and_downloaded(cli: Callable[..., Any], ids: tuple[str, str], tmp_path: Path) -> None:
    result = cli(
        "merge", *ids, "--method", "cat", "--name", "both", "--weight", f"{ids[1]}=0.5", "-o", tmp_path / "out"
    )
    assert result.code == 0, result.err
    assert "energy kept" in result.out
    assert "interference" in result.out
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "adapter_model.safetensors").is_file()
    merged = cli("adapters", "list", "--name", "both", "--json").json["items"][0]
    tree = cli("adapters", "lineage", merged["id"])
    assert all(parent in tree.out for parent in ids)
    edges = cli("adapters", "lineage", merged["id"], "--json").json["edges"]
    assert {edge["parent"]: edge["recipe"]["weight"] for edge in edges} == {ids[0]: 1.0, ids[1]: 0.5}
    assert merged["id"] in cli("adapters", "lineage", ids[0]).out


def test_merge_without_waiting_then_watch(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    job = cli("merge", *ids, "--method", "svd", "--rank", "2", "--no-wait", "--json").json
    assert job["state"] in {"queued", "running", "succeeded"}
    watched = cli("jobs", "watch", job["id"], "--json")
    assert watched.code == 0, watched.err
    assert watched.json["state"] == "succeeded"
    assert watched.json["result"]["report"]["rank"] == 2
    shown = cli("jobs", "get", job["id"])
    assert "merge report: svd" in shown.out
    listed = cli("jobs", "list", "--kind", "merge", "--state", "succeeded")
    assert job["id"] in listed.out


def test_an_impossible_merge_is_refused_at_once(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    result = cli("merge", *ids, "--method", "svd", "--rank", "6", "--json")
    assert result.code == 1
    assert result.json["code"] == "rank_out_of_range"
    assert "/parameters/rank" in result.err
    assert "hint" in result.err


def test_cancel_and_retry_of_a_finished_job(cli: Callable[..., Any], ids: tuple[str, str]) -> None:
    job = cli("merge", *ids, "--method", "cat", "--json").json
    for command in ("cancel", "retry"):
        result = cli("jobs", command, job["id"], "--json")
        assert result.code == 1
        assert result.json["code"] == "state_conflict"


def test_cancel_then_retry(cli: Callable[..., Any], ids: tuple[str, str], remote: str) -> None:
    """A job behind a longer one is cancelled while queued; its retry is a new job that succeeds."""
    with Client(remote) as client:
        ahead = cli("merge", *ids, "--method", "lego", "--set", "n_init=1000", "--no-wait", "--json").json
        job = cli("merge", *ids, "--method", "linear", "--no-wait", "--json").json
        cancelled = cli("jobs", "cancel", job["id"], "--json")
        ended = watch(client, job["id"])
        watch(client, ahead["id"])
    if cancelled.code == 1:  # the pool was faster than this test: then it must have said so
        assert cancelled.json["code"] == "state_conflict"
        assert ended["state"] == "succeeded"
        return
    assert ended["state"] == "cancelled"
    failed = cli("jobs", "watch", job["id"], "--json")
    assert failed.code == 1
    assert failed.json["job"]["state"] == "cancelled"
    again = cli("jobs", "retry", job["id"], "--json").json
    assert again["id"] != job["id"]
    assert cli("jobs", "watch", again["id"]).code == 0


def test_delete_asks_first(cli: Callable[..., Any], tmp_path: Path, adapters: tuple[Path, Path]) -> None:
    config = json.loads((adapters[0] / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] = 0.25
    (adapters[0] / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = cli("adapters", "add", adapters[0], "--json").json["id"]
    assert cli("adapters", "delete", adapter).code == 1, "no answer is no"
    assert cli("adapters", "get", adapter).code == 0
    assert cli("adapters", "delete", adapter, "--yes", "--json").json == {"id": adapter, "deleted": True}
    assert cli("adapters", "get", adapter).code == 1


def test_methods(cli: Callable[..., Any]) -> None:
    listed = cli("methods", "--json").json["items"]
    assert {"lego", "cat", "svd", "linear"} <= {item["name"] for item in listed}
    assert "LoRA-LEGO" in cli("methods").out
    shown = cli("methods", "lego")
    for text in ("sign_alignment", "2409.16167", "canonical", "2r"):
        assert text in shown.out
    assert cli("methods", "nope", "--json").json["code"] == "not_found"


def test_workers(cli: Callable[..., Any]) -> None:
    (server,) = cli("workers", "--json").json["items"]
    shown = cli("workers").out
    assert server["id"] in shown
    assert [slot["name"] for slot in server["slots"]] == ["cpu:0"]
    assert "cpu:0" in shown


def test_models(cli: Callable[..., Any], model_roots: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = model_roots / "tiny"
    folder.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(10, 12)}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        '{"architectures": ["TinyForCausalLM"], "model_type": "llama"}', encoding="utf-8"
    )
    added = cli("models", "add", folder, "--name", "acme/registered", "--json")
    assert added.code == 0, added.err
    model = added.json["id"]
    assert added.json["source"] == "path"
    hub = cli(
        "models", "add", "acme/elsewhere", "--revision", "0123456789abcdef0123456789abcdef01234567", "--json"
    ).json
    assert hub["source"] == "hub"
    listed = cli("models", "list")
    assert model in listed.out
    assert "in use" in listed.out
    assert cli("models", "get", model, "--json").json["name"] == "acme/registered"
    assert "it was registered by its place" in cli("models", "recipe", model).out
    deprecated = cli("models", "deprecate", model, "--at", "2030-01-02", "--remove-at", "2030-02-03", "--json").json
    assert deprecated["deprecated_at"].startswith("2030-01-02T00:00:00")
    assert deprecated["remove_at"].startswith("2030-02-03T00:00:00")
    restored = cli("models", "deprecate", model, "--undo", "--json").json
    assert restored["deprecated_at"] is None
    assert restored["remove_at"] is None
    assert cli("models", "deprecate", model, "--undo", "--at", "2030-01-02").code == 2
    advised = cli("models", "deprecate", model, "--successor", hub["id"], "--reason", "too old", "--json").json
    assert (advised["successor"], advised["deprecation_reason"]) == (hub["id"], "too old")
    assert cli("models", "remove", model, "--yes", "--json").json["removed_at"]
    assert cli("models", "remove", model, "--undo", "--json").json["removed_at"] is None


def test_a_model_outside_of_the_roots(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("models", "add", tmp_path, "--json")
    assert result.code == 1
    assert result.json["status"] == 422
