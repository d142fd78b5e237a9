"""The choice of the provider, and what of Ray comes into a process that only chooses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from structlog.testing import capture_logs

from artifacts.errors import RequestInvalid
from workers import providers
from workers.failures import crashed
from workers.local import LocalProvider
from workers.provider import Slot, WorkerStartError
from workers.providers import RaySettings, make_provider
from workers.ray_actor import NodeFolder, local_slots
from workers.ray_messages import Plan
from workers.ray_provider import RayProvider


def test_local_processes_have_the_devices_of_the_settings() -> None:
    provider = make_provider("local", "cpu:2", RaySettings())
    assert isinstance(provider, LocalProvider)
    assert [slot.name for slot in provider.slots()] == ["cpu:0", "cpu:1"]
    provider.close()


def test_a_ray_provider_is_made_without_a_cluster() -> None:
    provider = make_provider("ray", "gpu:2", RaySettings("ray://10.0.0.1:10001", "/scratch", {"GPU": 1, "CPU": 4}))
    assert isinstance(provider, RayProvider)
    assert (provider._request.address, provider._request.plan.work_dir) == ("ray://10.0.0.1:10001", "/scratch")
    provider.close()


def test_devices_are_checked_when_the_provider_is_made() -> None:
    with pytest.raises(RequestInvalid):
        make_provider("ray", "cuda:0", RaySettings())


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestInvalid, match="Ray is not installed") as refused:
        make_provider("ray", "auto", RaySettings())
    assert "rankwise[ray]" in str(refused.value.hint)


def test_the_server_imports_no_ray() -> None:
    program = (
        "import sys, app.main, workers.ray_provider, workers.ray_actor; "
        "print([name for name in ('ray', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_credentials_of_the_blob_store_are_passed_on_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "s3cret")
    monkeypatch.setenv("HOMEASSISTANT_TOKEN", "other")
    request = RayProvider("10.0.0.1:6379")._request
    passed = {name: value for name, value in request.plan.environment.items() if not name.startswith("GOOGLE_")}
    assert passed.items() >= {"AWS_SECRET_ACCESS_KEY": "s3cret", "AZURE_STORAGE_ACCOUNT_KEY": "s3cret"}.items()
    assert "HOMEASSISTANT_TOKEN" not in passed
    assert "s3cret" not in repr(request)


def plan(resources: dict[str, float], devices: int) -> Plan:
    return Plan("1", resources, devices, 1, None, ())


@pytest.mark.parametrize(
    ("resources", "devices", "expected"),
    [
        ({"CPU": 1}, 2, ["cpu", "cpu"]),
        ({"GPU": 1.0}, 1, ["cuda:0"]),
        ({"GPU": 1.0}, 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ({"GPU": 0.5}, 1, ["cuda:0"]),
    ],
)
def test_slots_are_counted_anew_on_the_node(resources: dict[str, float], devices: int, expected: list[str]) -> None:
    """Ray shows an actor its own GPUs and no others, so they are the first ones there."""
    assert [slot.device for slot in local_slots(plan(resources, devices))] == expected


def test_a_worker_takes_slots_of_one_node_that_is_there(ray_catalogue_of: Any) -> None:
    provider = ray_catalogue_of({"a" * 56: {"GPU": 0.5}, "b" * 56: {"GPU": 0.5}})
    first, second = (slot for slot in provider.slots())
    for slots, why in (
        ([Slot("gpu:7@x", "cuda:7")], "gone"),
        ([first, second], "one Ray node"),
    ):
        with pytest.raises(WorkerStartError, match=why):
            provider.start(slots, lambda: None)


@pytest.fixture
def ray_catalogue_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes providers that believe to know a cluster, and have no connection."""
    from workers.ray_messages import ClusterNode
    from workers.ray_slots import SlotRules

    class Connection:
        connected, lost = True, False

    def make(nodes: dict[str, dict[str, float]]) -> RayProvider:
        provider = RayProvider("10.0.0.1:1", SlotRules(resources={"GPU": 0.5}))
        monkeypatch.setattr(provider, "_running_driver", Connection)
        provider._catalogue.update([ClusterNode(key, "10.0.0.1", value) for key, value in nodes.items()])
        return provider

    return make


def test_halves_of_a_gpu_do_not_serve_one_job_together(ray_catalogue_of: Any) -> None:
    provider = ray_catalogue_of({"a" * 56: {"GPU": 1.0}})
    assert len(provider.slots()) == 2
    with pytest.raises(WorkerStartError, match="share a GPU"):
        provider.start(provider.slots(), lambda: None)


def test_a_lost_node_is_told_as_such() -> None:
    error = crashed({"code": None, "signal": None, "peak_memory": None, "lost": "the node abc was lost"})
    assert error["code"] == "worker_lost"
    assert "the node abc was lost" in error["detail"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.ray_actor.tempfile.gettempdir", lambda: str(tmp_path))
    folder = NodeFolder(None)
    assert folder.root.parent == tmp_path
    assert folder.root.stat().st_mode & 0o077 == 0
    folder.remove()
    folder.root.chmod(0o777)
    with pytest.raises(PermissionError, match="ray_work_dir"):
        NodeFolder(None)


def test_left_over_folders_go_and_those_in_use_stay(tmp_path: Any) -> None:
    first = NodeFolder(str(tmp_path))
    left = tmp_path / "actor-dead"
    left.mkdir()
    (left / "lock").touch()
    second = NodeFolder(str(tmp_path))
    assert not left.exists()
    assert first.path.exists()
    assert second.path != first.path
    for folder in (first, second):
        folder.remove()


def test_a_cluster_that_is_not_there_is_told_once_per_try(wait_until: Any) -> None:
    provider = RayProvider("127.0.0.1:1")
    with capture_logs() as logs:
        assert provider.slots() == ()
        wait_until(lambda: provider.slots() == () and provider._failures == 1, "the failure is seen")
        provider.close()
    (refusal,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert refusal["event"] == "ray_unreachable"
    assert "127.0.0.1:1" in refusal["detail"]
    assert "RANKWISE_RAY_ADDRESS" in refusal["hint"]
