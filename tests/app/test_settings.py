"""Settings: defaults that run, environment, and the refusal to open an unguarded door."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, is_loopback


def test_defaults_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.data_dir == tmp_path / "rankwise-data"
    assert settings.database_url == f"sqlite:///{tmp_path}/rankwise-data/rankwise.db"
    assert settings.blob_url == f"file://{tmp_path}/rankwise-data/blobs"
    assert (settings.pool, settings.devices, settings.host, settings.port) == ("local", "auto", "127.0.0.1", 8000)
    assert settings.api_keys is False


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATA_DIR": str(tmp_path),
        "DATABASE_URL": "postgresql://user@host/db",
        "API_KEYS": "on",
        "HOST": "0.0.0.0",
        "POOL": "OFF",
        "MODEL_ROOTS": f"{tmp_path}/a{os.pathsep}{tmp_path}/b",
        "MAX_UPLOAD_BYTES": "1000",
        "LOG_LEVEL": "DEBUG",
    }.items():
        monkeypatch.setenv(f"RANKWISE_{name}", value)
    settings = Settings()
    assert settings.api_keys is True
    assert settings.pool == "off"
    assert settings.model_roots == (tmp_path / "a", tmp_path / "b")
    assert settings.database_url == "postgresql://user@host/db"
    assert settings.max_upload_bytes == 1000
    monkeypatch.setenv("RANKWISE_MODEL_ROOTS", '["/models"]')
    assert Settings().model_roots == (Path("/models"),)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_another_address_needs_keys(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="refusing to bind"):
        Settings(data_dir=tmp_path, host=host)
    assert Settings(data_dir=tmp_path, host=host, api_keys=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_none(host: str, tmp_path: Path) -> None:
    assert is_loopback(host)
    assert Settings(data_dir=tmp_path, host=host).api_keys is False


def test_networks_of_webhooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(data_dir=tmp_path).webhook_allowed_networks == ()
    monkeypatch.setenv("RANKWISE_WEBHOOK_ALLOWED_NETWORKS", "10.0.0.0/8, ::1 ,")
    settings = Settings(data_dir=tmp_path)
    assert [str(network) for network in settings.webhook_allowed_networks] == ["10.0.0.0/8", "::1/128"]
    monkeypatch.setenv("RANKWISE_WEBHOOK_ALLOWED_NETWORKS", '["127.0.0.1"]')
    assert [str(network) for network in Settings(data_dir=tmp_path).webhook_allowed_networks] == ["127.0.0.1/32"]
    for wrong in ("10.0.0.1/8", "example.com", "10.0.0.0/33"):
        monkeypatch.setenv("RANKWISE_WEBHOOK_ALLOWED_NETWORKS", wrong)
        with pytest.raises(ValidationError):
            Settings(data_dir=tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"port": 70_000}, {"pool": "cloud"}, {"max_upload_bytes": 0}, {"colour": "red"}, {"beat_seconds": 40}],
)
def test_values_out_of_range(values: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Settings(data_dir=tmp_path, **values)  # type: ignore[arg-type]
