"""`rankwise db`: the database's schema, and the files that its rows refer to."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer

from app.cli.config import load_settings
from app.cli.options import DataDir, Json
from app.cli.output import print_json, size, stdout

app = typer.Typer(
    help="Database and stored files. Works on RANKWISE_DATABASE_URL and RANKWISE_BLOB_URL.", no_args_is_help=True
)


@app.command("upgrade")
def upgrade(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Bring the schema up to date; safe while several servers start at once."""
    _report(data_dir=data_dir, migrate=True, as_json=as_json)


@app.command("current")
def current(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Print the schema's revision; exit code 1 when it is not the newest."""
    if not _report(data_dir=data_dir, migrate=False, as_json=as_json):
        raise typer.Exit(1)


def _report(*, data_dir: DataDir, migrate: bool, as_json: bool) -> bool:
    """Print the revision, after migrating if asked to; whether it is the newest."""
    from storage.database import Database

    settings = load_settings(data_dir=data_dir)
    if migrate:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    try:
        if migrate:
            database.upgrade()
        else:
            database.check()
        found, head = database.current_revision(), database.head_revision()
    finally:
        database.dispose()
    if as_json:
        print_json({"current": found, "head": head, "up_to_date": found == head})
    else:
        state = "up to date" if found == head else f"the newest is {head}; run `rankwise db upgrade`"
        stdout().print(f"{found or 'empty'} ({state})", markup=False)
    return found == head


@app.command("sweep")
def sweep(
    hours: Annotated[float, typer.Option("--hours", min=0.0, help="Only what is at least this old.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Remove stored files that no adapter, dataset or job refers to any more; safe while the service runs."""
    from storage.blobs import BlobStore
    from storage.database import Database
    from storage.sweep import sweep_blobs

    settings = load_settings(data_dir=data_dir)
    database = Database(settings.database_url)
    try:
        report = sweep_blobs(database, BlobStore(settings.blob_url), timedelta(hours=hours), dry_run)
    finally:
        database.dispose()
    if as_json:
        print_json(asdict(report))
    else:
        verb = "would remove" if dry_run else "removed"
        freed = f"{len(report.deleted)} of {report.scanned} files, {size(report.bytes_freed)}"
        stdout().print(f"{verb} {freed}, and {report.staging_removed} abandoned uploads", markup=False)
