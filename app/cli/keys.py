"""`rankwise keys`: API keys. Works on the database directly, so that the first key needs no key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.config import load_settings
from app.cli.options import DataDir, Json
from app.cli.output import fields, note, print_json, size, stdout, table

if TYPE_CHECKING:
    from storage.database import Database
    from storage.quotas import KeyUse
    from storage.tables import ApiKeyRow

_LIMIT_NAMES = ("max_queued", "max_running", "max_bytes")
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_AMOUNT = re.compile(r"(?P<number>[0-9]{1,19}) ?(?P<unit>|kb|mb|gb|tb)", re.IGNORECASE)
MaxQueued = Annotated[
    str | None, typer.Option("--max-queued", metavar="N", help="Jobs of it that may wait at once; none: no limit.")
]
MaxRunning = Annotated[
    str | None,
    typer.Option("--max-running", metavar="N", help="Device slots that its jobs may hold at once; none: no limit."),
]
MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="BYTES", help="Bytes of the adapters it made, e.g. 20GB; none: no limit."),
]

app = typer.Typer(
    help="API keys. Works on the database of RANKWISE_DATABASE_URL, so that the first key needs no key.",
    no_args_is_help=True,
)


@contextmanager
def _database(data_dir: DataDir) -> Iterator[Database]:
    from storage.database import Database

    settings = load_settings(data_dir=data_dir)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    try:
        database.upgrade()
        yield database
    finally:
        database.dispose()


def _document(row: ApiKeyRow, use: KeyUse) -> dict[str, Any]:
    """A key as JSON: everything but its digest."""
    moments = ("created_at", "expires_at", "last_used_at", "revoked_at")
    return {
        "id": row.id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": list(row.scopes),
        "limits": {name: getattr(row, name) for name in _LIMIT_NAMES},
        "use": {"queued": use.queued, "running": use.running, "slots": use.slots, "bytes": row.stored_bytes},
        **{name: value.isoformat() if (value := getattr(row, name)) else None for name in moments},
    }


def _parse_limits(given: dict[str, str | None]) -> dict[str, int | None]:
    """The limits that were given on the command line, as numbers; `none` is None."""
    limits: dict[str, int | None] = {}
    for name, value in given.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        match = _AMOUNT.fullmatch(value.strip())
        if value.strip().lower() == "none":
            limits[name] = None
        elif match is None or (match["unit"] and name != "max_bytes"):
            form = "a whole number of bytes, or one with kB, MB, GB or TB" if name == "max_bytes" else "a whole number"
            raise typer.BadParameter(f"{value!r} is not {form}, nor none", param_hint=option)
        else:
            limits[name] = int(match["number"]) * _UNITS[match["unit"].lower()]
    return limits


def _of_limit(used: int, limit: int | None) -> str:
    return f"{used}" if limit is None else f"{used} of {limit}"


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, write, jobs, client or admin; may be given several times."),
    ] = None,
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="Days until it expires; never unless given.")
    ] = None,
    max_queued: MaxQueued = None,
    max_running: MaxRunning = None,
    max_bytes: MaxBytes = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a key and print its secret, once: only its digest is kept."""
    from storage.keys import KeyLimits, create_key
    from storage.quotas import KeyUse

    scopes = tuple(scope) if scope else ("read", "write", "jobs")
    expires = datetime.now(UTC) + timedelta(days=days) if days else None
    limits = _parse_limits({"max_queued": max_queued, "max_running": max_running, "max_bytes": max_bytes})
    with _database(data_dir) as database, database.write() as session:
        row, secret = create_key(session, name, scopes, expires, KeyLimits(**limits))
        document = _document(row, KeyUse())
    if as_json:
        print_json({**document, "secret": secret})
        return
    stdout().print(secret, markup=False)
    note(f"{document['id']} with the scopes {', '.join(document['scopes'])}. The secret is not shown again.")
    note("use it: export RANKWISE_API_KEY=…, or the header Authorization: Bearer …")


@app.command("list")
def list_keys(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List all keys with their limits and what they use of them; their secrets are not kept."""
    from storage import keys, quotas

    with _database(data_dir) as database, database.read() as session:
        uses = quotas.key_uses(session)
        documents = [_document(row, uses.get(row.id, quotas.KeyUse())) for row in keys.list_keys(session)]
    if as_json:
        print_json(documents)
        return
    rows = [
        (
            item["id"],
            item["name"],
            f"rw_{item['prefix']}_…",
            item["scopes"],
            "revoked" if item["revoked_at"] else item["expires_at"] or "never",
            item["last_used_at"],
            _of_limit(item["use"]["queued"], item["limits"]["max_queued"]),
            _of_limit(item["use"]["slots"], item["limits"]["max_running"]),
            size(item["use"]["bytes"])
            + ("" if item["limits"]["max_bytes"] is None else f" of {size(item['limits']['max_bytes'])}"),
        )
        for item in documents
    ]
    columns = ("id", "name", "key", "scopes", "expires", "last used", "#queued", "#slots", "#stored")
    stdout().print(table(None, columns, rows))


@app.command("limits")
def limits(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key's id (key_…).")],
    max_queued: MaxQueued = None,
    max_running: MaxRunning = None,
    max_bytes: MaxBytes = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Change a key's limits, those that are given, and show all of them."""
    from storage import keys, quotas

    changes = _parse_limits({"max_queued": max_queued, "max_running": max_running, "max_bytes": max_bytes})
    with _database(data_dir) as database, database.write() as session:
        row = keys.set_limits(session, key, changes)
        document = _document(row, quotas.key_uses(session).get(row.id, quotas.KeyUse()))
    if as_json:
        print_json(document)
        return
    allowed, use = document["limits"], document["use"]
    shown = {
        "queued jobs": _of_limit(use["queued"], allowed["max_queued"]),
        "slots in use": _of_limit(use["slots"], allowed["max_running"]),
        "stored bytes": _of_limit(use["bytes"], allowed["max_bytes"]),
    }
    stdout().print(fields(document["name"], shown))


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key's id (key_…).")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Revoke a key: from now on every call with it is refused."""
    from storage.keys import revoke_key

    with _database(data_dir) as database, database.write() as session:
        revoke_key(session, key)
    print_json({"id": key, "revoked": True}) if as_json else stdout().print(f"revoked {key}", markup=False)
