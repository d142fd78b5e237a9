"""`config`, `db` and `keys`: they work on settings and database, with no service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKWISE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_config_show_says_where_a_value_comes_from(
    cli: Callable[..., Any], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWISE_PORT", "8123")
    rows = {row["name"]: row for row in cli("config", "show", "--json").json}
    assert rows["port"] == {"name": "port", "variable": "RANKWISE_PORT", "value": 8123, "source": "environment"}
    assert rows["host"]["source"] == "default"
    assert rows["data_dir"] == {**rows["data_dir"], "value": str(data_dir), "source": "environment"}
    assert rows["database_url"]["source"] == "derived from data_dir"
    assert str(data_dir) in rows["database_url"]["value"]
    other = {row["name"]: row for row in cli("config", "show", "--data-dir", data_dir / "x", "--json").json}
    assert other["data_dir"]["source"] == "command line"
    assert "RANKWISE_MAX_UPLOAD_BYTES" in cli("config", "show").out


def test_config_show_masks_secrets(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_DATABASE_URL", "postgresql+psycopg://someone:hunter2@db:5432/rankwise")
    for arguments in (("config", "show"), ("config", "show", "--json")):
        result = cli(*arguments)
        assert result.code == 0
        assert "hunter2" not in result.out + result.err
        assert "someone" in result.out


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANKWISE_PORT", "many", "RANKWISE_PORT"),
        ("RANKWISE_HOST", "0.0.0.0", "RANKWISE_API_KEYS=on"),
        ("RANKWISE_POOL", "cloud", "RANKWISE_POOL"),
    ],
)
def test_settings_that_can_not_be_used(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    for arguments in (("config", "show"), ("serve",), ("worker",), ("db", "current")):
        result = cli(*arguments)
        assert result.code == 1
        assert words in result.err
        assert result.out == ""


def test_db_current_and_upgrade(cli: Callable[..., Any]) -> None:
    before = cli("db", "current", "--json")
    assert before.code == 1
    upgraded = cli("db", "upgrade", "--json")
    assert upgraded.code == 0, upgraded.err
    assert upgraded.json["up_to_date"] is True
    assert upgraded.json["current"] == upgraded.json["head"]
    after = cli("db", "current")
    assert after.code == 0
    assert "up to date" in after.out
    assert cli("db", "upgrade").code == 0, "a second time changes nothing"


def test_sweep_removes_what_nothing_refers_to(cli: Callable[..., Any], data_dir: Path) -> None:
    from storage.blobs import BlobStore

    assert cli("db", "upgrade").code == 0
    blobs = BlobStore((data_dir / "blobs").as_uri())
    digest = blobs.put_bytes(b"orphan")
    kept = cli("db", "sweep", "--json")
    assert kept.code == 0, kept.err
    assert list(kept.json["deleted"]) == [], "younger than a day"
    tried = cli("db", "sweep", "--hours", "0", "--dry-run")
    assert "would remove 1 of 1 files, 6 B" in tried.out
    assert blobs.exists(digest)
    swept = cli("db", "sweep", "--hours", "0", "--json").json
    assert list(swept["deleted"]) == [digest]
    assert not blobs.exists(digest)


def test_a_database_that_is_not_there(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_DATABASE_URL", "postgresql+psycopg://someone:hunter2@127.0.0.1:9/rankwise")
    result = cli("db", "upgrade", "--json")
    assert result.code == 1
    assert result.json["code"] == "database_unavailable"
    assert "hunter2" not in result.out + result.err


def test_keys_from_creation_to_revocation(cli: Callable[..., Any]) -> None:
    created = cli("keys", "create", "robot", "--scope", "read", "--scope", "jobs", "--days", "30", "--json").json
    assert created["secret"].startswith(f"rw_{created['prefix']}_")
    assert created["scopes"] == ["read", "jobs"]
    assert created["expires_at"] > created["created_at"]
    plain = cli("keys", "create", "person")
    assert plain.out.startswith("rw_")
    assert plain.out.count("\n") == 1, "the secret alone is on standard output"
    listed = cli("keys", "list", "--json").json
    assert [item["name"] for item in listed] == ["robot", "person"]
    assert listed[1]["scopes"] == ["read", "write", "jobs"]
    assert created["secret"] not in cli("keys", "list").out
    assert cli("keys", "revoke", created["id"]).code == 0
    assert cli("keys", "list", "--json").json[0]["revoked_at"] is not None
    assert "revoked" in cli("keys", "list").out


@pytest.mark.parametrize("arguments", [("create", "x", "--scope", "everything"), ("create", " "), ("revoke", "key_0")])
def test_keys_that_can_not_be(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    result = cli("keys", *arguments)
    assert result.code == 1
    assert "Traceback" not in result.err
