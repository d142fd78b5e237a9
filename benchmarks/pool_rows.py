"""Tables with a million rows for the benchmark of the pool: made from a seed, loaded in bulk.

The rows look like those of a busy service: few common and many rare base models and tags, names of several words,
half of them with a file that many share. Only `modules`, which no list reads, is shorter than in reality.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from storage.database import Database
from storage.text import short_digest

START = datetime(2026, 1, 1, tzinfo=UTC)
FIRST_WORDS = ("Amber", "Blue", "Calm", "Dark", "Eager", "Faint", "Golden", "Hazy", "Icy", "Jolly", "Keen", "Lunar")
NOUNS = ("anchor", "bridge", "castle", "dragon", "engine", "forest", "garden", "harbor", "island", "jungle", "needle")
STYLES = ("watercolor", "pixel", "noir", "sketch", "anime", "photo", "clay", "legal", "medical", "code", "chat", "math")
CLUSTER = "nightingale"  # in the names of one twentieth of the adapters, all made one after another long ago
METHODS = ("lora", "rslora", "dora", "pissa", "olora", "loftq")
METHOD_WEIGHTS = (800, 100, 70, 20, 9, 1)
BASE_MODELS = tuple(f"org-{number % 17}/base-{number:03d}" for number in range(200))
TAGS = tuple(f"tag-{number:03d}" for number in range(500))
MODELS = tuple(f"mdl_{number:032x}" for number in range(50))
OWNERS = ("anonymous", *(f"key_{number:032x}" for number in range(20)))
KINDS = ("merge", "merge", "merge", "train", "compose")
CONFIG = json.dumps(
    {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
)
MODULE = json.dumps([{"path": f"model.layers.{layer}.self_attn.q_proj", "rank": 16} for layer in range(4)])
REPORT = json.dumps({"used_keys": 8, "ignored": [], "nonfinite": {}, "dropped_files": [], "warnings": []})


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of rows."""

    adapters: int
    finished_jobs: int
    queued_jobs: int


Table = tuple[str, Sequence[str], Iterable[Sequence[Any]]]
"""Its name, its columns and its rows."""


def load(database: Database, sizes: Sizes, seed: int = 0) -> None:
    """Fill empty, migrated tables and gather the statistics that the databases plan with."""
    tables: list[Table] = [
        ("api_keys", *_keys()),
        ("models", *_models()),
        ("adapters", *_adapters(sizes.adapters, seed)),
        ("adapter_tags", *_tags(sizes.adapters, seed)),
        ("blobs", *_blobs(sizes.adapters)),
        ("adapter_files", *_files(sizes.adapters)),
        ("jobs", *_jobs(sizes)),
        ("job_attempts", *_attempts(sizes)),
        ("job_events", *_events(sizes)),
        ("job_queues", *_queues(sizes)),
    ]
    load_tables(database, tables)


def load_tables(database: Database, tables: Sequence[Table]) -> None:
    """Add rows in bulk, without their indexes and checks, and gather the statistics."""
    if database.is_sqlite:
        _load_sqlite(str(database.path), tables)
    else:
        url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
        _load_postgres(url, tables)


def _words(text: str) -> list[str]:
    return text.split()


def moment(number: int) -> str:
    """When row `number` was made."""
    return (START + timedelta(seconds=2 * number, microseconds=number % 1000)).strftime("%Y-%m-%d %H:%M:%S.%f")


def identifier(prefix: str, number: int) -> str:
    """Ids in the order of creation, as UUIDv7 gives them."""
    return f"{prefix}_{1767225600000 + 2000 * number:012x}{number:020x}"


def digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def adapter_name(number: int, total: int) -> str:
    choice = random.Random(number)
    words = [choice.choice(FIRST_WORDS), choice.choice(NOUNS), choice.choice(STYLES), f"{number:07d}"]
    if total // 10 <= number < total // 10 + total // 20:
        words.insert(2, CLUSTER)
    return "-".join(words)


def _rare(choice: random.Random, values: Sequence[str]) -> str:
    """One of the values; the first ones are by far the most frequent."""
    return values[int(len(values) * choice.random() ** 3)]


def _is_deleted(number: int) -> bool:
    return number % 33 == 5


def _keys() -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    columns = ("id", "name", "prefix", "sha256", "scopes", "stored_bytes", "created_at")
    return columns, ((key, key, key[-12:], digest(key), "[]", 0, moment(0)) for key in OWNERS[1:])


def _models() -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    columns = ("id", "name", "identity_digest", "source", "location", "created_at")
    rows = ((key, BASE_MODELS[n], digest("model", n), "hub", BASE_MODELS[n], moment(n)) for n, key in enumerate(MODELS))
    return columns, rows


def _adapters(total: int, seed: int) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    columns = _words(
        "id name name_folded description tags format method base_model model_id rank alpha target_modules module_count "
        "parameter_count dtype size mergeable weights_digest identity_digest config modules report origin created_at "
        "deleted_at"
    )

    def rows() -> Iterator[Sequence[Any]]:
        for number, base, model, method in _facts(total, seed):
            name, made = adapter_name(number, total), moment(number)
            tags = json.dumps(adapter_tags(number, seed))
            yield (
                identifier("adp", number), name, name.casefold(), "", tags, "peft", method, base, model, 16, 32.0,
                '["q_proj", "v_proj"]', 4, 65536, "BF16", 131072, True, digest("weights", number // 2),
                digest("identity", number), CONFIG, MODULE, REPORT, "upload", made,
                made if _is_deleted(number) else None,
            )  # fmt: skip

    return columns, rows()


def _facts(total: int, seed: int) -> Iterator[tuple[int, str, str | None, str]]:
    """Number, base model, registered model and method of each adapter."""
    choice = random.Random(seed)
    for number in range(total):
        base = _rare(choice, BASE_MODELS)
        place = BASE_MODELS.index(base)
        model = MODELS[place] if place < len(MODELS) and number % 3 == 0 else None
        yield number, base, model, choice.choices(METHODS, METHOD_WEIGHTS)[0]


def adapter_tags(number: int, seed: int) -> list[str]:
    choice = random.Random(f"{seed}/{number}")
    return sorted({_rare(choice, TAGS) for _ in range(choice.randrange(4))})


def _tags(total: int, seed: int) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    digests = {base: short_digest(base) for base in BASE_MODELS}
    rows = (
        (
            identifier("adp", number),
            tag,
            moment(number),
            digests[base],
            model,
            method,
            adapter_name(number, total).casefold(),
        )
        for number, base, model, method in _facts(total, seed)
        if not _is_deleted(number)
        for name in (adapter_name(number, total),)
        for tag in adapter_tags(number, seed)
    )
    return _words("adapter_id tag created_at base_model_digest model_id method name_folded"), rows


def config_digest(number: int) -> str:
    """Half of the adapters have the same configuration file."""
    return digest("config", 0 if number % 2 else number % 1000)


def _blobs(total: int) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    def rows() -> Iterator[Sequence[Any]]:
        yield from ((found, 200, moment(0)) for found in sorted({config_digest(n) for n in range(min(total, 1000))}))
        yield from ((digest("file", number), 131072, moment(number)) for number in range(total))

    return ("sha256", "size", "created_at"), rows()


def _files(total: int) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    def rows() -> Iterator[Sequence[Any]]:
        for number in range(total):
            adapter, made = identifier("adp", number), moment(number)
            yield adapter, "adapter_config.json", config_digest(number), 200, "application/json", made
            yield adapter, "adapter_model.safetensors", digest("file", number), 131072, "application/octet-stream", made

    return ("adapter_id", "path", "sha256", "size", "media_type", "created_at"), rows()


def _jobs(sizes: Sizes) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    columns = _words(
        "id kind owner devices affinity params resources state precedence attempt failures restarts available_at "
        "cancel_requested fraction message last_event result created_by created_at started_at finished_at"
    )
    params = json.dumps(
        {"adapters": [{"id": identifier("adp", n)} for n in (1, 2)], "method": "lego", "parameters": {}}
    )
    result = json.dumps({"adapters": [identifier("adp", 3)], "images": [], "report": {"energy_kept": 0.93}})

    def rows() -> Iterator[Sequence[Any]]:
        for number in range(sizes.finished_jobs + sizes.queued_jobs):
            queued = number >= sizes.finished_jobs
            state = (
                "queued"
                if queued
                else ("failed" if number % 12 == 0 else "cancelled" if number % 50 == 1 else "succeeded")
            )
            owner, made = job_owner(number), moment(number)
            yield (
                identifier("job", number), KINDS[number % 5], owner, 1, MODELS[number % 50], params, "{}", state,
                -(number % 3), 0 if queued else 1, 0, 0, made, False, 0.0 if queued else 1.0, "", 1,
                None if queued else result, None if owner == "anonymous" else owner, made,
                None if queued else made, None if queued else made,
            )  # fmt: skip

    return columns, rows()


def job_owner(number: int) -> str:
    """The first owner has half of the jobs."""
    return OWNERS[0] if number % 2 else OWNERS[number // 2 % len(OWNERS)]


def _attempts(sizes: Sizes) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    columns = ("job_id", "attempt", "server_id", "slot", "started_at", "finished_at", "outcome")
    rows = (
        (identifier("job", n), 1, "srv_1", "cpu:0", moment(n), moment(n), "succeeded")
        for n in range(sizes.finished_jobs)
    )
    return columns, rows


def _events(sizes: Sizes) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    data = json.dumps({"state": "queued", "attempt": 0})
    total = sizes.finished_jobs + sizes.queued_jobs
    return ("job_id", "sequence", "type", "data", "created_at"), (
        (identifier("job", number), 1, "state", data, moment(number)) for number in range(total)
    )


def _queues(sizes: Sizes) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    waiting = dict.fromkeys(OWNERS, 0)
    for number in range(sizes.finished_jobs, sizes.finished_jobs + sizes.queued_jobs):
        waiting[job_owner(number)] += 1
    return ("owner", "devices", "queued", "running"), ((owner, 1, queued, 0) for owner, queued in waiting.items())


def _load_sqlite(path: str, tables: Sequence[Table]) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=OFF", "cache_size=-400000", "foreign_keys=OFF"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    for table, columns, rows in tables:
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL", [table]
        ).fetchall()
        connection.execute("BEGIN IMMEDIATE")
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        places = ", ".join("?" * len(columns))
        connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", rows)
        for _, definition in indexes:
            connection.execute(definition)
        connection.execute("COMMIT")
    connection.execute("ANALYZE")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def _load_postgres(url: str, tables: Sequence[Table]) -> None:
    with psycopg.connect(url) as connection:
        for setting in (
            "session_replication_role = replica",
            "maintenance_work_mem = '512MB'",
            "synchronous_commit = off",
        ):
            connection.execute(f"SET {setting}")
        for table, columns, rows in tables:
            indexes = connection.execute(
                "SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) FROM pg_index i "
                "LEFT JOIN pg_constraint c ON c.conindid = i.indexrelid AND c.contype IN ('p', 'u') "
                "WHERE i.indrelid = %s::regclass AND c.oid IS NULL",
                [table],
            ).fetchall()
            for name, _ in indexes:
                connection.execute(f"DROP INDEX {name}")
            with connection.cursor().copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            for _, definition in indexes:
                connection.execute(definition)
            connection.commit()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
