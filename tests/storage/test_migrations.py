from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text

from artifacts.errors import DatabaseUnavailable
from artifacts.manifest import AdapterManifest
from storage import adapters, jobs, migrations
from storage.database import Database
from storage.tables import AdapterTagRow, Base

TABLES = {table.name for table in Base.metadata.sorted_tables}
SEARCH_TABLES = "adapter_name"  # how those begin that hold the index of names on SQLite


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without tables; on SQLite without a file."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'data' / 'rankwise.db'}")
    else:
        database = Database(request.getfixturevalue("new_postgres")())
    yield database
    database.dispose()


def table_names(database: Database) -> set[str]:
    names = set(inspect(database.engine).get_table_names()) - {"alembic_version"}
    return {name for name in names if not name.startswith(SEARCH_TABLES)}


def test_upgrade_makes_all_tables_and_again_changes_nothing(empty: Database) -> None:
    assert empty.current_revision() is None
    empty.upgrade()
    assert table_names(empty) == TABLES
    assert empty.current_revision() == empty.head_revision()
    with empty.write() as session:
        job = jobs.create_job(session, "merge", {})
    empty.upgrade()
    with empty.read() as session:
        assert jobs.get_job(session, job.id).kind == "merge"


def test_down_and_up_again(empty: Database) -> None:
    empty.upgrade()
    with empty.write() as session:
        jobs.create_job(session, "merge", {})
    migrations.downgrade(empty, "base")
    assert table_names(empty) == set()
    assert empty.current_revision() is None
    empty.upgrade()
    assert table_names(empty) == TABLES
    empty.check()


def test_tags_keep_their_adapters_up_and_down(empty: Database, make_manifest: Callable[..., AdapterManifest]) -> None:
    empty.upgrade()
    with empty.write() as session:
        for number, base in enumerate(["org/näme", None]):
            manifest = make_manifest(base_model=base, identity_digest=f"{number:064x}")
            adapters.add_adapter(session, manifest, name=f"Namen {number}", tags=["a", f"b{number}"])

    def tags() -> list[tuple[object, ...]]:
        with empty.read() as session:
            return sorted(tuple(row) for row in session.execute(select(AdapterTagRow.__table__)))

    before = tags()
    assert len(before) == 4
    migrations.downgrade(empty, "0005")
    with empty.engine.connect() as connection:
        old = connection.execute(text("SELECT tag, adapter_id FROM adapter_tags")).all()
    assert sorted((row.adapter_id, row.tag) for row in old) == sorted((row[0], row[1]) for row in before)
    empty.upgrade()
    assert tags() == before


def is_in_metadata(item: object, name: str | None, kind: str, reflected: bool, other: object) -> bool:
    """Not the index of names: the metadata knows neither tables of FTS5 nor functions."""
    return not (reflected and str(name).startswith((SEARCH_TABLES, "ix_adapters_name_grams")))


def test_migrations_and_tables_do_not_drift_apart(empty: Database) -> None:
    empty.upgrade()
    with empty.engine.connect() as connection:
        options = {"compare_type": True, "include_object": is_in_metadata}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_the_partial_index_is_partial(empty: Database) -> None:
    empty.upgrade()
    indexes = {index["name"]: index for index in inspect(empty.engine).get_indexes("adapters")}
    index = indexes["uq_adapters_live_identity"]
    assert index["unique"]
    where = {**index.get("dialect_options", {})}
    assert "deleted_at IS NULL" in str(where.get("sqlite_where", where.get("postgresql_where")))


def test_there_is_one_head() -> None:
    assert len(ScriptDirectory.from_config(migrations.config()).get_heads()) == 1


def _upgrade(url: str, answers: SimpleQueue[str]) -> None:
    database = Database(url)
    try:
        database.upgrade()
        database.check()
        answers.put("done")
    except Exception as error:
        answers.put(repr(error))
    database.dispose()


def test_processes_that_start_at_once_migrate_once(empty: Database, processes: ForkServerContext) -> None:
    answers = processes.SimpleQueue()
    url = empty.url.render_as_string(hide_password=False)
    children = [processes.Process(target=_upgrade, args=(url, answers)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [answers.get() for _ in children] == ["done"] * 4
    assert table_names(empty) == TABLES


def test_a_failing_migration_changes_nothing(empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the last step failed")

    monkeypatch.setattr(migrations, "_check_foreign_keys", fail)
    with pytest.raises(RuntimeError, match="the last step failed"):
        empty.upgrade()
    assert table_names(empty) == set()
    monkeypatch.undo()
    empty.upgrade()
    assert table_names(empty) == TABLES


def test_a_database_of_a_newer_version_is_left_alone(empty: Database) -> None:
    empty.upgrade()
    with empty.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseUnavailable, match="9999") as caught:
        empty.upgrade()
    assert "newer version" in (caught.value.hint or "")
    with pytest.raises(DatabaseUnavailable, match="9999"):
        empty.check()
    assert table_names(empty) == TABLES


def test_the_folder_is_found_from_anywhere(tmp_path: Path) -> None:
    program = (
        "from storage.database import Database\n"
        f"d = Database('sqlite:///{tmp_path / 'r.db'}')\n"
        "d.upgrade(); d.check(); print(d.current_revision())"
    )
    path = f"import sys; sys.path.insert(0, {str(migrations.ROOT)!r})\n"
    ended = subprocess.run(
        [sys.executable, "-c", path + program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""
    assert ended.stdout.strip() == migrations.head_revision()


def test_the_alembic_command_checks_the_database(
    sqlite_template: Path, tmp_path: Path, run_alembic: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    url = f"sqlite:///{tmp_path / 'r.db'}"
    (tmp_path / "r.db").write_bytes(sqlite_template.read_bytes())
    ended = run_alembic("-x", f"url={url}", "check")
    assert ended.returncode == 0, ended.stderr
    assert "No new upgrade operations detected" in ended.stdout + ended.stderr


@pytest.fixture
def run_alembic(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    monkeypatch.delenv("RANKWISE_DATABASE_URL", raising=False)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "alembic", *arguments]
        return subprocess.run(command, cwd=migrations.ROOT, capture_output=True, text=True, check=False)

    return run


def test_the_alembic_command_needs_a_database(run_alembic: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ended = run_alembic("current")
    assert ended.returncode != 0
    assert "RANKWISE_DATABASE_URL" in ended.stderr


def test_a_folder_that_can_not_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatabaseUnavailable, match="can not be written"):
        Database(f"sqlite:///{tmp_path / 'file' / 'r.db'}").upgrade()
