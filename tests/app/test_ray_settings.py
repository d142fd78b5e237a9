"""POOL=ray: what the settings accept, and what they refuse before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.main import pool_settings
from app.settings import Settings

REACHABLE = {"database_url": "postgresql://db.example.org/rankwise", "blob_url": "s3://bucket"}


def test_a_ray_pool_has_its_address_resources_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_POOL", "Ray")
    monkeypatch.setenv("RANKWISE_RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setenv("RANKWISE_RAY_WORK_DIR", "/scratch")
    monkeypatch.setenv("RANKWISE_RAY_SLOT_RESOURCES", '{"GPU": 0.5, "CPU": 4}')
    made = pool_settings(Settings(data_dir=tmp_path, **REACHABLE))
    assert made.pool == "ray"
    assert (made.ray.address, made.ray.work_dir) == ("ray://head:10001", "/scratch")
    assert made.ray.slot_resources == {"GPU": 0.5, "CPU": 4}


@pytest.mark.parametrize(("ray_address", "expected"), [(None, "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_the_address_is_rays_own_or_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str | None, expected: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if ray_address is not None:
        monkeypatch.setenv("RAY_ADDRESS", ray_address)
    made = pool_settings(Settings(data_dir=tmp_path, pool="ray", **REACHABLE))
    assert (made.ray.address, made.ray.work_dir, made.ray.slot_resources) == (expected, None, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"database_url": ""}, "database_url"),
        ({"database_url": "sqlite:////shared/rankwise.db"}, "database_url"),
        ({"blob_url": ""}, "blob_url"),
        ({"blob_url": "file:///shared/blobs"}, "blob_url"),
        ({"blob_url": "memory://"}, "blob_url"),
    ],
)
def test_what_the_nodes_can_not_reach_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"must reach the {named}") as refused:
        Settings(data_dir=tmp_path, pool="ray", **{**REACHABLE, **changes})
    assert "RANKWISE_DATABASE_URL to a PostgreSQL database and RANKWISE_BLOB_URL to s3://" in str(refused.value)


def test_local_pools_may_have_all_that(tmp_path: Path) -> None:
    assert pool_settings(Settings(data_dir=tmp_path)).pool == "local"
