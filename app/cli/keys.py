"""`rankwise keys`: API keys. Works on the database directly, so that the first key needs no key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.config import load_settings
from app.cli.options import DataDir, Json
from app.cli.output import note, print_json, stdout, table

if TYPE_CHECKING:
    from storage.database import Database
    from storage.tables import ApiKeyRow

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


def _document(row: ApiKeyRow) -> dict[str, Any]:
    """A key as JSON: everything but its digest."""
    moments = ("created_at", "expires_at", "last_used_at", "revoked_at")
    return {
        "id": row.id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": list(row.scopes),
        **{name: value.isoformat() if (value := getattr(row, name)) else None for name in moments},
    }


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it.")],
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="read, write, jobs or admin; may be given several times.")
    ] = None,
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="Days until it expires; never unless given.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a key and print its secret, once: only its digest is kept."""
    from storage.keys import create_key

    scopes = tuple(scope) if scope else ("read", "write", "jobs")
    expires = datetime.now(UTC) + timedelta(days=days) if days else None
    with _database(data_dir) as database, database.write() as session:
        row, secret = create_key(session, name, scopes, expires)
        document = _document(row)
    if as_json:
        print_json({**document, "secret": secret})
        return
    stdout().print(secret, markup=False)
    note(f"{document['id']} with the scopes {', '.join(document['scopes'])}. The secret is not shown again.")
    note("use it: export RANKWISE_API_KEY=…, or the header Authorization: Bearer …")


@app.command("list")
def list_keys(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List all keys; their secrets are not kept."""
    from storage import keys

    with _database(data_dir) as database, database.read() as session:
        documents = [_document(row) for row in keys.list_keys(session)]
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
        )
        for item in documents
    ]
    stdout().print(table(None, ("id", "name", "key", "scopes", "expires", "last used"), rows))


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
