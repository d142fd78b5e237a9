from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest
from sqlalchemy import select

from artifacts.base_model import BaseModelRef
from artifacts.errors import NotFound, RequestInvalid
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, jobs, models
from storage.adapters import AdapterFilter, Parent
from storage.database import Database
from storage.ids import is_id
from storage.tables import AdapterFileRow, AdapterRow, BlobRow, LineageRow

Make = Callable[..., AdapterManifest]


def add(database: Database, manifest: AdapterManifest, name: str = "mine", **options: Any) -> AdapterRow:
    with database.write() as session:
        row, new = adapters.add_adapter(session, manifest, name=name, **options)
    assert new
    return row


def found(database: Database, **filters: str) -> list[str]:
    with database.read() as session:
        return [row.name for row in adapters.list_adapters(session, AdapterFilter(**filters)).items]


def test_an_adapter_comes_back_as_it_was_added(database: Database, make_manifest: Make) -> None:
    manifest = make_manifest()
    added = add(database, manifest, "Ünïcode 😀", description="two\nlines", tags=["a", "b c"])
    assert is_id(added.id, "adp")
    with database.read() as session:
        row = adapters.get_adapter(session, added.id)
        assert adapters.manifest_of(row) == manifest
    assert (row.name, row.description, row.tags, row.origin) == ("Ünïcode 😀", "two\nlines", ["a", "b c"], "upload")
    assert (row.module_count, row.size, row.deleted_at) == (1, 1556, None)
    assert adapters.manifest_of(added) == manifest  # also the row that the call itself returned, after its session


def test_the_blobs_of_an_adapter_get_rows(database: Database, make_manifest: Make) -> None:
    manifest = make_manifest()
    add(database, manifest)
    with database.read() as session:
        assert {(row.sha256, row.size) for row in session.scalars(select(BlobRow))} == {
            (file.sha256, file.size) for file in manifest.files
        }


def test_the_same_content_again_gives_the_first_row_unchanged(database: Database, make_manifest: Make) -> None:
    first = add(database, make_manifest(), "first")
    resaved = make_manifest(files=(FileEntry("a.safetensors", "ab" * 32, 5, "x/y"),))
    with database.write() as session:
        second, new = adapters.add_adapter(session, resaved, name="second", tags=["t"])
    assert (second.id, second.name, second.tags, new) == (first.id, "first", [], False)
    assert found(database) == ["first"]


def test_the_uploader_may_name_another_base_model(database: Database, make_manifest: Make) -> None:
    manifest = make_manifest(base_model_revision="abc")
    row = add(database, manifest, base_model="org/other")
    assert (row.base_model, row.base_model_revision) == ("org/other", None)
    row = add(database, make_manifest("b", base_model_revision="abc"), base_model="org/base")
    assert (row.base_model, row.base_model_revision) == ("org/base", "abc")


@pytest.mark.parametrize(
    "options",
    [
        {"name": "x" * 201},
        {"name": "a\x00b"},
        {"description": "\ud800"},
        {"tags": ["ok", "\x00"]},
        {"base_model": "b" * 301},
    ],
)
def test_text_that_can_not_be_stored_is_refused_and_leaves_nothing(
    database: Database, make_manifest: Make, options: dict[str, Any]
) -> None:
    with pytest.raises(RequestInvalid), database.write() as session:
        adapters.add_adapter(session, make_manifest(), **{"name": "fine", **options})
    with database.read() as session:
        for table in (AdapterRow, AdapterFileRow, BlobRow):
            assert session.scalars(select(table)).all() == []


def test_an_unknown_parent_or_model_is_refused(database: Database, make_manifest: Make) -> None:
    for options in ({"parents": [Parent("adp_none", {})]}, {"model_id": "mdl_none"}, {"model_id": "a\x00"}):
        with pytest.raises(NotFound), database.write() as session:
            adapters.add_adapter(session, make_manifest(), name="x", **options)  # type: ignore[arg-type]


def test_a_deleted_adapter_is_hidden_and_its_content_can_come_again(database: Database, make_manifest: Make) -> None:
    first = add(database, make_manifest(), "first")
    with database.write() as session:
        adapters.delete_adapter(session, first.id)
    with database.read() as session:
        with pytest.raises(NotFound, match="deleted"):
            adapters.get_adapter(session, first.id)
        assert adapters.get_adapter(session, first.id, deleted=True).deleted_at is not None
    with database.write() as session, pytest.raises(NotFound):
        adapters.delete_adapter(session, first.id)
    assert found(database) == []
    second = add(database, make_manifest(), "second")
    assert second.id != first.id
    assert found(database) == ["second"]


@pytest.mark.parametrize("adapter_id", ["adp_none", "", "a\x00b", "\ud800"])
def test_an_unknown_adapter_is_not_found(database: Database, adapter_id: str) -> None:
    with database.write() as session:
        for call in (adapters.get_adapter, adapters.delete_adapter, adapters.lineage):
            with pytest.raises(NotFound):
                call(session, adapter_id)


def test_identical_adds_at_once_give_one_row_to_all(database: Database, make_manifest: Make) -> None:
    gate = threading.Barrier(4)
    answers: list[tuple[str, bool]] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        gate.wait()
        try:
            with database.write() as session:
                row, new = adapters.add_adapter(session, make_manifest(), name=f"from {number}")
                answer = (row.id, new)
            answers.append(answer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({identifier for identifier, _ in answers}) == 1
    assert sorted(new for _, new in answers) == [False, False, False, True]
    assert len(found(database)) == 1


def _add_in_process(url: str, manifest: AdapterManifest, answers: SimpleQueue[tuple[str, bool]]) -> None:
    database = Database(url)
    with database.write() as session:
        row, new = adapters.add_adapter(session, manifest, name="same")
    answers.put((row.id, new))
    database.dispose()


def test_identical_adds_of_processes_give_one_row(
    database: Database, make_manifest: Make, processes: ForkServerContext
) -> None:
    url, queue = database.url.render_as_string(hide_password=False), processes.SimpleQueue()
    children = [processes.Process(target=_add_in_process, args=(url, make_manifest(), queue)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    answers = [queue.get() for _ in children]
    assert len({identifier for identifier, _ in answers}) == 1
    assert sorted(new for _, new in answers) == [False, False, True]


def test_an_add_that_waits_for_one_that_is_rolled_back_goes_through(database: Database, make_manifest: Make) -> None:
    added, give_up = threading.Event(), threading.Event()

    def fail() -> None:
        with pytest.raises(RuntimeError), database.write() as session:
            adapters.add_adapter(session, make_manifest(), name="rolled back")
            added.set()
            give_up.wait()
            raise RuntimeError("the upload failed")

    failing = threading.Thread(target=fail)
    failing.start()
    added.wait()
    waiting = threading.Thread(target=lambda: add(database, make_manifest(), "kept"))
    waiting.start()
    give_up.set()
    failing.join()
    waiting.join()
    assert found(database) == ["kept"]


def test_filters(database: Database, make_manifest: Make) -> None:
    add(database, make_manifest("1"), "Französisch STRASSE", tags=["lang", "fr"])
    add(database, make_manifest("2", method="rslora", base_model="org/two"), "Sum of 100%", tags=["math"])
    add(database, make_manifest("3", base_model=None), "plain_name", tags=[])
    assert found(database) == ["plain_name", "Sum of 100%", "Französisch STRASSE"]
    assert found(database, method="rslora") == ["Sum of 100%"]
    assert found(database, base_model="org/base") == ["Französisch STRASSE"]
    assert found(database, tag="fr") == ["Französisch STRASSE"]
    assert found(database, tag="f") == []
    assert found(database, tag='"fr"') == []
    assert found(database, name="straße") == ["Französisch STRASSE"]
    assert found(database, name="FRANZÖ") == ["Französisch STRASSE"]
    assert found(database, name="%") == ["Sum of 100%"]
    assert found(database, name="_") == ["plain_name"]
    assert found(database, name="m", method="lora") == ["plain_name"]
    assert found(database, name="\x00") == found(database, tag="\ud800") == []


def test_digests_find_files_weights_and_autov2(database: Database, make_manifest: Make) -> None:
    manifest = make_manifest("1")
    add(database, manifest, "wanted")
    add(database, make_manifest("2"), "other")
    file = manifest.files[1].sha256
    for digest in (file, file.upper(), manifest.files[0].sha256, manifest.weights_digest, file[:10], file[:10].upper()):
        assert found(database, sha256=digest) == ["wanted"]
    assert found(database, sha256="0" * 64) == []
    assert found(database, sha256=manifest.weights_digest[:10]) == []  # AutoV2 is of a file
    for bad in ("", "xyz", file[:9], file[:63], file + "0", "%" * 10):
        with pytest.raises(RequestInvalid, match="AutoV2"):
            found(database, sha256=bad)


def test_a_registered_model_filters_by_its_id(database: Database, make_manifest: Make) -> None:
    with database.write() as session:
        model, _ = models.add_model(session, BaseModelRef("base", "path", "/models/base", weights_digest="ab" * 32))
    add(database, make_manifest("1"), "with", model_id=model.id)
    add(database, make_manifest("2"), "without")
    assert found(database, base_model=model.id) == ["with"]


def test_pages_do_not_shift_when_rows_come_and_go(database: Database, make_manifest: Make) -> None:
    rows = [add(database, make_manifest(str(number)), f"n{number}") for number in range(7)]
    with database.read() as session:
        first = adapters.list_adapters(session, limit=3)
    assert [row.name for row in first.items] == ["n6", "n5", "n4"]
    add(database, make_manifest("new"), "newest")
    with database.write() as session:
        adapters.delete_adapter(session, rows[4].id)
    with database.read() as session:
        second = adapters.list_adapters(session, cursor=first.next, limit=3)
        third = adapters.list_adapters(session, cursor=second.next, limit=3)
    assert [row.name for row in second.items] == ["n3", "n2", "n1"]
    assert [row.name for row in third.items] == ["n0"]
    assert third.next is None


def test_a_list_leaves_the_modules_out(database: Database, make_manifest: Make) -> None:
    add(database, make_manifest())
    with database.read() as session:
        row = adapters.list_adapters(session).items[0]
        assert [file.path for file in row.files] == ["adapter_config.json", "adapter_model.safetensors"]
        with pytest.raises(Exception, match="modules"):
            _ = row.modules


def test_the_base_is_the_registered_model_else_the_name(database: Database, make_manifest: Make) -> None:
    fingerprint = (("model.layers.0.self_attn.q_proj", 32, 64),)
    ref = BaseModelRef(
        "org/base", "hub", "org/base", revision="c0ffee", weights_digest="ab" * 32, fingerprint=fingerprint
    )
    named = add(database, make_manifest("1", base_model="org/unknown", base_model_revision="r1"))
    nothing = add(database, make_manifest("2", base_model=None))
    by_name = add(database, make_manifest("3"))
    with database.write() as session:
        model, _ = models.add_model(session, ref)
    by_id = add(database, make_manifest("4", base_model="renamed"), model_id=model.id)
    other_revision = add(database, make_manifest("5", base_model_revision="beef"))
    with database.read() as session:
        assert adapters.base_of(session, named) == BaseModelRef.named("org/unknown", "r1")
        assert adapters.base_of(session, nothing) is None
        assert adapters.base_of(session, by_name) == ref
        assert adapters.base_of(session, by_id) == ref
        assert adapters.base_of(session, other_revision) == BaseModelRef.named("org/base", "beef")


def family(database: Database, make_manifest: Make) -> dict[str, str]:
    """a, b → c (by a job); c, d → e; c → f; and an unrelated g."""
    ids: dict[str, str] = {}
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
    for name, parents in {"a": "", "b": "", "d": "", "g": "", "c": "ab", "e": "cd", "f": "c"}.items():
        edges = [Parent(ids[parent], {"weight": 0.5, "method": "lego", "of": parent}) for parent in parents]
        ids[name] = add(
            database, make_manifest(name), name, parents=edges, origin="merge" if edges else "upload", job_id=job.id
        ).id
    return ids


def names_and_edges(database: Database, adapter_id: str) -> tuple[str, list[str]]:
    with database.read() as session:
        graph = adapters.lineage(session, adapter_id)
    names = {row.id: row.name for row in graph.nodes}
    assert not graph.truncated
    return "".join(sorted(names.values())), [names[edge.parent_id] + names[edge.child_id] for edge in graph.edges]


def test_lineage_goes_both_ways_and_not_sideways(database: Database, make_manifest: Make) -> None:
    ids = family(database, make_manifest)
    assert names_and_edges(database, ids["c"]) == ("abcef", ["ac", "bc", "ce", "cf"])
    assert names_and_edges(database, ids["a"]) == ("acef", ["ac", "ce", "cf"])
    assert names_and_edges(database, ids["e"]) == ("abcde", ["ac", "bc", "ce", "de"])
    assert names_and_edges(database, ids["d"]) == ("de", ["de"])
    assert names_and_edges(database, ids["g"]) == ("g", [])


def test_an_edge_has_the_recipe_and_the_job(database: Database, make_manifest: Make) -> None:
    ids = family(database, make_manifest)
    with database.read() as session:
        edge = adapters.lineage(session, ids["f"]).edges[-1]
    assert (edge.parent_id, edge.child_id, edge.position) == (ids["c"], ids["f"], 0)
    assert edge.recipe == {"weight": 0.5, "method": "lego", "of": "c"}
    assert edge.job_id is not None


def test_deleted_ancestors_stay_in_the_lineage(database: Database, make_manifest: Make) -> None:
    ids = family(database, make_manifest)
    with database.write() as session:
        adapters.delete_adapter(session, ids["c"])
    assert names_and_edges(database, ids["f"]) == ("abcf", ["ac", "bc", "cf"])
    with database.read() as session:
        deleted = {row.name for row in adapters.lineage(session, ids["f"]).nodes if row.deleted_at is not None}
    assert deleted == {"c"}


def test_a_parent_named_twice_is_one_edge_and_a_deleted_one_may_be_a_parent(
    database: Database, make_manifest: Make
) -> None:
    parent = add(database, make_manifest("p"))
    with database.write() as session:
        adapters.delete_adapter(session, parent.id)
    add(database, make_manifest("c"), parents=[Parent(parent.id, {"n": 1}), Parent(parent.id, {"n": 2})])
    with database.read() as session:
        assert [edge.recipe for edge in session.scalars(select(LineageRow))] == [{"n": 1}]


def test_a_large_family_is_cut_off_near_the_adapter(
    database: Database, make_manifest: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.lineage.MAX_NODES", 4)
    chain = [add(database, make_manifest("0"), "0")]
    for number in range(1, 9):
        chain.append(add(database, make_manifest(str(number)), str(number), parents=[Parent(chain[-1].id)]))
    with database.read() as session:
        graph = adapters.lineage(session, chain[4].id)
    assert graph.truncated
    assert [row.name for row in graph.nodes] == ["2", "3", "4", "5"]
    assert [(edge.parent_id, edge.child_id) for edge in graph.edges] == [
        (chain[number].id, chain[number + 1].id) for number in (2, 3, 4)
    ]


def test_reserving_twice_keeps_one_row_with_the_newer_date(database: Database) -> None:
    file = FileEntry("x", hashlib.sha256(b"x").hexdigest(), 1, "t")
    with database.write() as session:
        adapters.reserve_blobs(session, [file, dataclasses.replace(file, path="y")])
    with database.read() as session:
        first = session.scalars(select(BlobRow)).one().created_at
    with database.write() as session:
        adapters.reserve_blobs(session, [])
        adapters.reserve_blobs(session, [file])
    with database.read() as session:
        assert session.scalars(select(BlobRow)).one().created_at >= first
