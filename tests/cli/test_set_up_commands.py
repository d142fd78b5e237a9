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


def test_limits_of_a_key(cli: Callable[..., Any]) -> None:
    created = cli("keys", "create", "ci", "--max-queued", "5", "--max-bytes", "20GB", "--json").json
    assert created["limits"] == {"max_queued": 5, "max_running": None, "max_bytes": 20 * 10**9}
    assert created["use"] == {"queued": 0, "running": 0, "slots": 0, "bytes": 0}
    changed = cli("keys", "limits", created["id"], "--max-running", "2", "--max-queued", "none", "--json")
    assert changed.code == 0, changed.err
    assert changed.json["limits"] == {"max_queued": None, "max_running": 2, "max_bytes": 20 * 10**9}
    (listed,) = cli("keys", "list", "--json").json
    assert listed["limits"] == changed.json["limits"]
    assert "0 of 2" in cli("keys", "list").out
    assert "0 B of 20.0 GB" in cli("keys", "list").out
    assert "0 of 2" in cli("keys", "limits", created["id"]).out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--max-queued", "many"), 2),
        (("--max-queued", "5GB"), 2),
        (("--max-queued", "-1"), 2),
        (("--max-bytes", "1.5GB"), 2),
        (("--max-bytes", "9999999999999999999"), 1),
        (("--max-running", "0"), 1),
    ],
)
def test_limits_that_can_not_be(cli: Callable[..., Any], arguments: tuple[str, str], code: int) -> None:
    key = cli("keys", "create", "ci", "--json").json["id"]
    result = cli("keys", "limits", key, *arguments)
    assert result.code == code
    assert "Traceback" not in result.err
    assert set(cli("keys", "list", "--json").json[0]["limits"].values()) == {None}


def test_limits_of_a_key_that_is_not_there(cli: Callable[..., Any]) -> None:
    assert cli("keys", "limits", "key_0", "--max-queued", "1", "--json").json["code"] == "not_found"
