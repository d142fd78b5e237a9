from __future__ import annotations

import hashlib
import io
import threading
from typing import Any

import pytest
from sqlalchemy import select

from artifacts.errors import BlobMissing, NotFound, QuotaExceeded, RequestInvalid, StateConflict
from storage import datasets, jobs, keys, schedules
from storage.blob_reader import BlobReader, open_blob
from storage.blobs import BlobStore
from storage.database import Database
from storage.datasets import DatasetFilter
from storage.keys import KeyLimits
from storage.schedules import JobTemplate, Trigger
from storage.tables import ApiKeyRow, DatasetRow

COLUMNS = [{"name": "text", "type": "string", "nulls": 0, "kinds": []}]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def add(database: Database, name: str, **options: Any) -> tuple[str, bool]:
    values: dict[str, Any] = {"format": "jsonl", "sha256": sha256(name), "size": 10, "rows": 3, "columns": COLUMNS}
    with database.write() as session:
        row, created = datasets.add_dataset(session, name=name, **values | options)
        return row.id, created


def page(database: Database, filters: DatasetFilter = DatasetFilter(), **options: Any) -> list[str]:
    with database.read() as session:
        return [row.name for row in datasets.list_datasets(session, filters, **options).items]


def test_what_is_added_is_found(database: Database) -> None:
    tasks = [{"task": "causal-lm", "form": "text", "columns": ["text"], "usable": True, "reason": None}]
    dataset_id, created = add(database, "First", tasks=tasks, warnings=["odd"])
    assert created
    assert dataset_id.startswith("dat_")
    with database.read() as session:
        row = datasets.get_dataset(session, dataset_id)
        assert (row.name, row.format, row.size, row.rows) == ("First", "jsonl", 10, 3)
        assert (row.columns, row.tasks, row.warnings) == (COLUMNS, tasks, ["odd"])


def test_the_same_file_is_stored_once_per_format(database: Database) -> None:
    first = add(database, "one", sha256=sha256("x"))
    assert add(database, "two", sha256=sha256("x")) == (first[0], False)
    assert add(database, "three", sha256=sha256("x"), format="csv")[1]
    with database.write() as session:
        datasets.delete_dataset(session, first[0])
    again = add(database, "four", sha256=sha256("x"))
    assert again[1]
    assert again[0] != first[0]


def test_many_at_once_give_one_row(database: Database) -> None:
    barrier, found = threading.Barrier(6), []

    def act() -> None:
        barrier.wait(30)
        found.append(add(database, "same"))

    threads = [threading.Thread(target=act) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({dataset_id for dataset_id, _ in found}) == 1
    assert sorted(created for _, created in found) == [False] * 5 + [True]


def test_lists_are_pages_and_filters_hold(database: Database) -> None:
    for number in range(5):
        add(database, f"Größe {number}", format="csv" if number % 2 else "jsonl")
    assert page(database) == [f"Größe {number}" for number in (4, 3, 2, 1, 0)]
    assert page(database, DatasetFilter(format="csv")) == ["Größe 3", "Größe 1"]
    assert page(database, DatasetFilter(name="GRÖSSE 2")) == ["Größe 2"]
    assert page(database, DatasetFilter(name="%")) == []
    assert page(database, DatasetFilter(name="\x00")) == []
    assert page(database, DatasetFilter(sha256=sha256("Größe 3"))) == ["Größe 3"]
    with database.read() as session:
        first = datasets.list_datasets(session, limit=2)
        second = datasets.list_datasets(session, limit=3, cursor=first.next)
        assert [row.name[-1] for row in (*first.items, *second.items)] == ["4", "3", "2", "1", "0"]
        assert second.next is None
        with pytest.raises(RequestInvalid, match="cursor"):
            datasets.list_datasets(session, DatasetFilter(name="x"), cursor=first.next)


def test_a_deleted_dataset_is_gone(database: Database) -> None:
    dataset_id, _ = add(database, "gone")
    with database.write() as session:
        datasets.delete_dataset(session, dataset_id)
    assert page(database) == []
    with database.write() as session:
        for call in (datasets.get_dataset, datasets.delete_dataset):
            for identifier in (dataset_id, "dat_" + "0" * 32, "dat_\x00"):
                with pytest.raises(NotFound):
                    call(session, identifier)
        assert session.get(DatasetRow, dataset_id) is not None, "the sweep removes it later"


def test_a_dataset_that_jobs_need_is_not_deleted(database: Database) -> None:
    dataset_id, _ = add(database, "needed")
    other_id, _ = add(database, "other")
    with database.write() as session:
        datasets.get_dataset(session, dataset_id, lock=True)
        job = jobs.create_job(session, "train", {"dataset": dataset_id, "method": "lora"})
    with database.write() as session:
        datasets.delete_dataset(session, other_id)
        with pytest.raises(StateConflict, match=f"1 unfinished jobs need the dataset 'needed': {job.id}"):
            datasets.delete_dataset(session, dataset_id)
    with database.write() as session:
        jobs.request_cancel(session, job.id)
        datasets.delete_dataset(session, dataset_id)
    assert page(database) == []


def test_a_job_that_is_being_made_keeps_its_dataset(database: Database) -> None:
    dataset_id, _ = add(database, "wanted")
    locked, deleting, ended = threading.Event(), threading.Event(), []

    def delete() -> None:
        locked.wait(30)
        deleting.set()
        try:
            with database.write() as session:
                datasets.delete_dataset(session, dataset_id)
        except StateConflict as error:
            ended.append(error)

    thread = threading.Thread(target=delete)
    thread.start()
    with database.write() as session:
        datasets.get_dataset(session, dataset_id, lock=True)
        locked.set()
        assert deleting.wait(30)
        thread.join(0.3)  # would let a deletion that does not wait go through
        assert thread.is_alive()
        jobs.create_job(session, "train", {"dataset": dataset_id})
    thread.join(60)
    assert len(ended) == 1
    assert page(database) == ["wanted"]


def test_bytes_are_charged_and_given_back(database: Database) -> None:
    with database.write() as session:
        key = keys.create_key(session, "k", ["admin"], limits=KeyLimits(max_bytes=25))[0].id

    def stored() -> int:
        with database.read() as session:
            return int(session.get_one(ApiKeyRow, key).stored_bytes)

    first, _ = add(database, "a", created_by=key)
    add(database, "a", created_by=key)
    add(database, "b", created_by=key)
    assert stored() == 20
    with pytest.raises(QuotaExceeded):
        add(database, "c", created_by=key)
    assert stored() == 20
    with database.write() as session:
        datasets.delete_dataset(session, first)
    assert stored() == 10
    assert add(database, "c", created_by=key)[1]


@pytest.mark.parametrize(("name", "problem"), [("a\x00b", r"U\+0000"), ("x" * 201, "201 characters")])
def test_a_name_that_can_not_be_stored(database: Database, name: str, problem: str) -> None:
    with pytest.raises(RequestInvalid, match=problem):
        add(database, name, sha256=sha256("x"))


def test_a_blob_is_read_as_a_file(blobs: BlobStore) -> None:
    content = b"".join(b"line %d\n" % number for number in range(300_000))
    digest = blobs.put_bytes(content)
    with open_blob(blobs, digest) as file:
        assert file.readline() == b"line 0\n"
        assert file.seek(-10, io.SEEK_END) == len(content) - 10
        assert file.read() == content[-10:]
        assert file.read(5) == b""
        assert file.seek(len(content) + 7) == len(content) + 7
        assert file.read() == b""
        file.seek(0)
        assert file.read() == content
    with BlobReader(blobs, digest) as raw:
        raw.seek(4)
        assert raw.seek(3, io.SEEK_CUR) == raw.tell() == 7
        with pytest.raises(ValueError, match="before the start"):
            raw.seek(-1)
    with pytest.raises(BlobMissing):
        open_blob(blobs, sha256("nothing"))


def test_a_dataset_is_dropped_at_once_when_nobody_else_names_it(database: Database) -> None:
    kept, _ = add(database, "one")
    with database.write() as session:
        own = jobs.create_job(session, "train", {"dataset": kept, "transferable": {"drop_dataset": True}}).id
        other = jobs.create_job(session, "train", {"dataset": kept, "transferable": None}).id
        template = JobTemplate("train", {"dataset": kept}, {})
        planned = schedules.create_schedule(session, Trigger(cron="0 3 * * *", timezone="UTC"), template).id
    with database.read() as session:
        assert datasets.users_of(session, kept, without=own) == [other, planned]
        assert datasets.dropping_job(session, kept) == own
    with database.write() as session:
        jobs.request_cancel(session, other)
        schedules.delete_schedule(session, planned)
        assert datasets.users_of(session, kept, without=own) == []
        jobs.request_cancel(session, own)
        assert datasets.dropping_job(session, kept) is None
    with database.write() as session:
        datasets.delete_dataset(session, kept)
    again, _ = add(database, "one")
    with database.write() as session:
        assert datasets.remove_dataset(session, again) == [sha256("one")]
        assert datasets.remove_dataset(session, again) == []
    with database.read() as session:
        assert session.scalars(select(DatasetRow)).all() == [], "the deleted one of the same file went too"
