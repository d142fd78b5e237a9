from __future__ import annotations

import threading

import pytest

from artifacts.base_model import BaseModelRef
from artifacts.errors import Conflict, NotFound, RequestInvalid
from storage import models
from storage.database import Database
from storage.ids import is_id
from storage.tables import ModelRow

REF = BaseModelRef(
    name="tiny",
    source="path",
    location="/models/tiny",
    architecture="UNet2DConditionModel",
    pipeline="StableDiffusionXLPipeline",
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    fingerprint=(("model.layers.0.mlp.up_proj", 8, 4), ("model.layers.0.self_attn.q_proj", 4, 4)),
)


def add(database: Database, ref: BaseModelRef, **options: int) -> tuple[ModelRow, bool]:
    with database.write() as session:
        return models.add_model(session, ref, **options)


def test_a_model_comes_back_as_it_was_registered(database: Database) -> None:
    row, new = add(database, REF, parameter_count=48)
    assert new
    assert is_id(row.id, "mdl")
    with database.read() as session:
        for key in (row.id, "tiny", "/models/tiny"):
            found = models.get_model(session, key)
            assert models.ref_of(found) == REF
            assert (found.parameter_count, found.fingerprint_digest) == (48, REF.fingerprint_digest)


def test_the_same_model_again_is_the_first_row(database: Database) -> None:
    first, _ = add(database, REF)
    second, new = add(database, BaseModelRef("another name", "path", "/models/tiny", weights_digest="ab" * 32))
    assert (second.id, second.name, new) == (first.id, "tiny", False)


def test_a_name_that_is_taken_is_a_conflict(database: Database) -> None:
    add(database, REF)
    with pytest.raises(Conflict, match="'tiny' belongs to"):
        add(database, BaseModelRef("tiny", "path", "/models/changed", weights_digest="ef" * 32))
    row, new = add(database, BaseModelRef("tiny-2", "path", "/models/tiny", weights_digest="ef" * 32))
    assert new  # other weights at the same place are another model
    with database.read() as session:
        assert models.get_model(session, "/models/tiny").id == row.id


def test_registrations_at_once_give_one_row(database: Database) -> None:
    gate, answers = threading.Barrier(3), []

    def work() -> None:
        gate.wait()
        row, new = add(database, REF)
        answers.append((row.id, new))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({identifier for identifier, _ in answers}) == 1
    assert sorted(new for _, new in answers) == [False, False, True]


def test_a_hub_model_is_found_by_name_and_revision(database: Database) -> None:
    old, _ = add(database, BaseModelRef("org/m@1", "hub", "org/m", revision="1"))
    new, _ = add(database, BaseModelRef("org/m@2", "hub", "org/m", revision="2"))
    floating, _ = add(database, BaseModelRef("org/m", "hub", "org/m"))
    with database.read() as session:
        assert find(session, "org/m") == floating.id
        assert find(session, "org/m", "1") == old.id
        assert find(session, "org/m", "2") == new.id
        assert find(session, "org/m", "3") == floating.id
        assert find(session, "org/m@1", "3") is None
        assert find(session, "org/none") is None
        assert find(session, "a\x00") is None
        with pytest.raises(NotFound, match="org/none"):
            models.get_model(session, "org/none")


def find(session: object, name: str, revision: str | None = None) -> str | None:
    row = models.find_model(session, name, revision)  # type: ignore[arg-type]
    return None if row is None else row.id


def test_lists_are_newest_first_without_fingerprints(database: Database) -> None:
    for number in range(3):
        add(database, BaseModelRef(f"m{number}", "path", f"/m{number}", fingerprint=REF.fingerprint))
    with database.read() as session:
        page = models.list_models(session, limit=2)
        rest = models.list_models(session, cursor=page.next, limit=2)
        with pytest.raises(Exception, match="fingerprint"):
            _ = page.items[0].fingerprint
    assert [row.name for row in (*page.items, *rest.items)] == ["m2", "m1", "m0"]


@pytest.mark.parametrize(
    "change", [{"name": "x" * 301}, {"name": "\x00"}, {"location": "\ud800"}, {"revision": "r" * 65}]
)
def test_text_that_can_not_be_stored_is_refused(database: Database, change: dict[str, str]) -> None:
    fields = {"name": "n", "source": "hub", "location": "l", **change}
    with pytest.raises(RequestInvalid):
        add(database, BaseModelRef(**fields))  # type: ignore[arg-type]
