"""The manifest for Kubernetes: one image, settings that exist, secrets and ports that match."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from workers.ray_slots import SlotRules

Document = dict[str, Any]


@pytest.fixture
def documents(root: Path) -> dict[str, Document]:
    text = (root / "docs" / "how-to" / "kuberay.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture
def service(documents: dict[str, Document]) -> Document:
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(container)


def pods(documents: dict[str, Document]) -> Iterator[Document]:
    cluster = documents["RayCluster"]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]
    yield documents["Deployment"]["spec"]["template"]["spec"]


def plain(container: Document) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def secrets(container: Document) -> dict[str, tuple[str, str]]:
    found = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry}
    return {name: (reference["name"], reference["key"]) for name, reference in found.items()}


def test_it_has_what_it_promises(documents: dict[str, Document]) -> None:
    assert set(documents) == {"RayCluster", "PersistentVolumeClaim", "Deployment", "Service"}


def test_one_image_everywhere_of_this_version(documents: dict[str, Document]) -> None:
    images = {container["image"] for pod in pods(documents) for container in pod["containers"]}
    (image,) = images
    assert image.rpartition(":")[2] == version("rankwise")
    assert documents["RayCluster"]["spec"]["rayVersion"] == version("ray")


def test_its_settings_exist_and_are_accepted(service: Document, tmp_path: Path, monkeypatch: Any) -> None:
    prefix = "RANKWISE_"
    names = {entry["name"] for entry in service["env"] if entry["name"].startswith(prefix)}
    assert {name.removeprefix(prefix).lower() for name in names} <= set(Settings.model_fields)
    for name, value in plain(service).items():
        if name.startswith(prefix):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANKWISE_DATABASE_URL", "postgresql://rankwise@postgres.example.org/rankwise")
    monkeypatch.setenv("RANKWISE_DATA_DIR", str(tmp_path))
    settings = Settings()
    assert settings.pool == "ray"
    SlotRules.parse(settings.devices, settings.ray_slot_resources)


def test_the_service_finds_the_head_and_has_its_token(documents: dict[str, Document], service: Document) -> None:
    cluster = documents["RayCluster"]
    name = cluster["metadata"]["name"]
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    port = next(port["containerPort"] for port in head["ports"] if port["name"] == "client")
    assert plain(service)["RANKWISE_RAY_ADDRESS"] == f"ray://{name}-head-svc:{port}"
    assert cluster["spec"]["authOptions"]["mode"] == plain(service)["RAY_AUTH_MODE"] == "token"
    assert secrets(service)["RAY_AUTH_TOKEN"] == (name, "auth_token")


def test_no_secret_is_written_down(documents: dict[str, Document], service: Document, root: Path) -> None:
    stores = {name: reference for name, reference in secrets(service).items() if reference[0] == "rankwise-stores"}
    assert set(stores) == {"RANKWISE_DATABASE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    text = (root / "docs" / "how-to" / "kuberay.yaml").read_text(encoding="utf-8")
    assert all(f"--from-literal={key}=" in text for _, key in stores.values())
    for pod in pods(documents):
        for container in pod["containers"]:
            assert not {"AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "RANKWISE_DATABASE_URL"} & set(plain(container))


def test_workers_have_gpus_and_the_disk_that_the_setting_names(
    documents: dict[str, Document], service: Document
) -> None:
    (group,) = documents["RayCluster"]["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    mounts = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    scratch = mounts[str(Path(plain(service)["RANKWISE_RAY_WORK_DIR"]).parent)]
    assert scratch in {volume["name"] for volume in pod["volumes"]}
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_traffic_reaches_the_service(documents: dict[str, Document], service: Document) -> None:
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert (
        documents["Service"]["spec"]["selector"] == labels == documents["Deployment"]["spec"]["selector"]["matchLabels"]
    )
    (port,) = documents["Service"]["spec"]["ports"]
    assert port["targetPort"] in {item["name"] for item in service["ports"]}
    assert service["args"] == ["serve"]
    claim = documents["Deployment"]["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    # Longer than the service itself gives a running job and its own end.
    assert documents["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
