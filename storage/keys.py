"""API keys: made once, shown once, kept as a SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, RequestInvalid, Unauthenticated
from storage import database
from storage.ids import new_id
from storage.tables import ApiKeyRow
from storage.text import is_storable, storable

SCOPES = ("read", "write", "jobs", "client", "admin")
TOUCH_INTERVAL = timedelta(minutes=1)
_SECRET = re.compile(r"rw_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_TRIES = 3
_NO_KEY = "0" * 64
_LOWEST = {"max_queued": 0, "max_running": 1, "max_bytes": 0}  # with no slot at all, jobs would wait for ever
_HIGHEST = {"max_queued": 2**31 - 1, "max_running": 2**31 - 1, "max_bytes": 2**63 - 1}


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use at once; None does not limit.

    Args:
        max_queued: jobs that may wait.
        max_running: device slots that its jobs may hold.
        max_bytes: bytes of the live adapters that it made.
    """

    max_queued: int | None = None
    max_running: int | None = None
    max_bytes: int | None = None


def create_key(
    session: Session,
    name: str,
    scopes: Iterable[str],
    expires_at: datetime | None = None,
    limits: KeyLimits | None = None,
) -> tuple[ApiKeyRow, str]:
    """A new key and its secret `rw_<prefix>_<32 random bytes>`, which is never to be seen again.

    Raises:
        RequestInvalid: an empty name, no scope or an unknown one, an expiry that is past, a limit out of range.
    """
    allowed = _checked(asdict(limits or KeyLimits()))
    if not name.strip():
        raise _invalid("/name", "must not be empty")
    wanted = set(scopes)
    if not wanted or not wanted <= set(SCOPES):
        raise _invalid("/scopes", f"must be some of {', '.join(SCOPES)}, not {', '.join(sorted(wanted)) or 'none'}")
    moment = database.now(session)
    if expires_at is not None and expires_at <= moment:
        raise _invalid("/expires_at", f"must be in the future, not {expires_at.isoformat()}")
    for remaining in reversed(range(_TRIES)):
        prefix = secrets.token_hex(6)
        secret = f"rw_{prefix}_{secrets.token_urlsafe(32)}"
        row = ApiKeyRow(
            id=new_id("key"),
            name=storable(name, "/name", 200),
            prefix=prefix,
            sha256=_digest(secret),
            scopes=[scope for scope in SCOPES if scope in wanted],
            created_at=moment,
            expires_at=expires_at,
            stored_bytes=0,
            **allowed,
        )
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError:  # the prefix is taken
            if not remaining:
                raise
            continue
        return row, secret
    raise AssertionError("unreachable")


def authenticate(session: Session, secret: str) -> ApiKeyRow:
    """The key that this is the secret of. Reads only; `touch_key` notes the use.

    Raises:
        Unauthenticated: not one of our keys, revoked, or expired; which of them is not told to those who guess.
    """
    match = _SECRET.fullmatch(secret)
    row = None
    if match is not None:
        row = session.scalars(select(ApiKeyRow).where(ApiKeyRow.prefix == match.group(1))).one_or_none()
    # the same work whether the prefix exists or not
    same = hmac.compare_digest(_digest(secret), _NO_KEY if row is None else row.sha256)
    if row is None or not same:
        raise Unauthenticated("the API key is not known here", hint="Send `Authorization: Bearer rw_…`.")
    if ended := _ended(session, row):
        raise Unauthenticated(f"the API key {row.name!r} {ended}", hint="Ask for a new one.")
    return row


def _ended(session: Session, row: ApiKeyRow) -> str | None:
    """Why a key is none any more."""
    if row.revoked_at is not None:
        return "was revoked"
    if row.expires_at is not None and row.expires_at <= database.now(session):
        return "has expired"
    return None


def touch_key(session: Session, key_id: str) -> None:
    """Note that the key was used now; a note of less than a minute ago is left as it is."""
    moment = database.now(session)
    session.execute(
        update(ApiKeyRow)
        .where(
            ApiKeyRow.id == key_id,
            or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < moment - TOUCH_INTERVAL),
        )
        .values(last_used_at=moment)
        .execution_options(synchronize_session=False)
    )


def list_keys(session: Session) -> Sequence[ApiKeyRow]:
    """All keys, revoked ones too, oldest first."""
    return session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id)).all()


def revoke_key(session: Session, key_id: str) -> ApiKeyRow:
    """End the key for ever. Twice is once.

    Raises:
        NotFound
    """
    row = get_key(session, key_id)
    if row.revoked_at is None:
        row.revoked_at = database.now(session)
        session.flush()
    return row


def get_key(session: Session, key_id: str) -> ApiKeyRow:
    """Raises NotFound."""
    row = session.get(ApiKeyRow, key_id) if is_storable(key_id) else None
    if row is None:
        raise NotFound(f"there is no API key {key_id!r}")
    return row


def get_live_key(session: Session, key_id: str) -> ApiKeyRow:
    """Raises NotFound: there is no such key, or it was revoked or has expired."""
    row = get_key(session, key_id)
    if ended := _ended(session, row):
        raise NotFound(f"the API key {row.name!r} {ended}")
    return row


def set_limits(session: Session, key_id: str, changes: Mapping[str, int | None]) -> ApiKeyRow:
    """Change the limits that `changes` names, as fields of `KeyLimits`; None takes one away.

    A limit below what is used already takes nothing back: it only refuses more.

    Raises:
        NotFound
        RequestInvalid: a limit out of range.
    """
    row = get_key(session, key_id)
    for name, value in _checked(changes).items():
        setattr(row, name, value)
    session.flush()
    return row


def _checked(limits: Mapping[str, int | None]) -> dict[str, int | None]:
    for name, value in limits.items():
        if value is not None and not _LOWEST[name] <= value <= _HIGHEST[name]:
            raise _invalid(f"/{name}", f"must be between {_LOWEST[name]} and {_HIGHEST[name]}, not {value}")
    return dict(limits)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _invalid(pointer: str, problem: str) -> RequestInvalid:
    return RequestInvalid(f"{pointer[1:]} {problem}", errors=[FieldError(pointer, problem)])
