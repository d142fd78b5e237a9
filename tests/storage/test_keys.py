from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from artifacts.errors import NotFound, RequestInvalid, Unauthenticated
from storage import keys
from storage.database import Database, now
from storage.tables import ApiKeyRow


def create(database: Database, name: str = "ci", expires_at: datetime | None = None) -> tuple[ApiKeyRow, str]:
    with database.write() as session:
        return keys.create_key(session, name, ["write", "read"], expires_at)


def test_the_secret_opens_and_only_its_digest_is_kept(database: Database) -> None:
    row, secret = create(database)
    assert secret.startswith(f"rw_{row.prefix}_")
    assert row.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert row.scopes == ["read", "write"]
    with database.read() as session:
        assert keys.authenticate(session, secret).id == row.id
        stored = session.scalars(select(ApiKeyRow)).one()
    assert secret not in repr(vars(stored))


def test_secrets_differ(database: Database) -> None:
    assert len({create(database)[1] for _ in range(20)}) == 20


def test_wrong_secrets_are_refused_alike(database: Database) -> None:
    row, secret = create(database)
    last = "A" if secret[-1] != "A" else "B"
    wrong = [
        "",
        "rw_",
        "Bearer x",
        secret[:-1],
        secret + "x",
        secret[:-1] + last,
        f"rw_{'0' * 12}_{'x' * 43}",
        "\x00",
        "\ud800",
    ]
    details = set()
    with database.read() as session:
        for text in [*wrong, secret.upper(), row.id, row.sha256]:
            with pytest.raises(Unauthenticated) as caught:
                keys.authenticate(session, text)
            details.add(caught.value.detail)
    assert len(details) == 1


def test_a_revoked_key_opens_nothing_any_more(database: Database) -> None:
    row, secret = create(database)
    with database.write() as session:
        first = keys.revoke_key(session, row.id).revoked_at
        assert keys.revoke_key(session, row.id).revoked_at == first
        with pytest.raises(NotFound):
            keys.revoke_key(session, "key_none")
    with database.read() as session, pytest.raises(Unauthenticated, match="revoked"):
        keys.authenticate(session, secret)


def test_an_expired_key_opens_nothing_any_more(database: Database) -> None:
    row, secret = create(database, expires_at=datetime.now(UTC) + timedelta(hours=1))
    with database.read() as session:
        assert keys.authenticate(session, secret).id == row.id
    with database.write() as session:
        session.get_one(ApiKeyRow, row.id).expires_at = now(session) - timedelta(seconds=1)
    with database.read() as session, pytest.raises(Unauthenticated, match="expired"):
        keys.authenticate(session, secret)


def test_use_is_noted_once_a_minute(database: Database) -> None:
    row, _ = create(database)
    stamps = []
    for _ in range(2):
        with database.write() as session:
            keys.touch_key(session, row.id)
        with database.read() as session:
            stamps.append(session.get_one(ApiKeyRow, row.id).last_used_at)
    assert stamps[0] is not None
    assert stamps[0] == stamps[1]
    old = stamps[0] - timedelta(minutes=2)
    with database.write() as session:
        session.get_one(ApiKeyRow, row.id).last_used_at = old
    with database.write() as session:
        keys.touch_key(session, row.id)
    with database.read() as session:
        noted = session.get_one(ApiKeyRow, row.id).last_used_at
    assert noted is not None
    assert noted > old


@pytest.mark.parametrize(
    ("name", "scopes", "expires_at", "pointer"),
    [
        (" ", ["read"], None, "/name"),
        ("x" * 201, ["read"], None, "/name"),
        ("n", [], None, "/scopes"),
        ("n", ["read", "root"], None, "/scopes"),
        ("n", ["read"], datetime(2020, 1, 1, tzinfo=UTC), "/expires_at"),
    ],
)
def test_impossible_keys_are_refused(
    database: Database, name: str, scopes: list[str], expires_at: datetime | None, pointer: str
) -> None:
    with database.write() as session, pytest.raises(RequestInvalid) as caught:
        keys.create_key(session, name, scopes, expires_at)
    assert caught.value.errors[0].pointer == pointer


def test_a_prefix_that_is_taken_is_drawn_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = create(database)
    draws = iter([first.prefix, first.prefix, "0123456789ab"])
    monkeypatch.setattr(keys.secrets, "token_hex", lambda _: next(draws))
    second, secret = create(database, "second")
    assert second.prefix == "0123456789ab"
    with database.read() as session:
        assert keys.authenticate(session, secret).name == "second"
        assert [row.name for row in keys.list_keys(session)] == ["ci", "second"]
