"""Images: their files, the key that pays for them, the sweep; and the previews of jobs that make them."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from artifacts.errors import AttemptCancelled, AttemptStale, NotFound, QuotaExceeded
from artifacts.manifest import FileEntry
from storage import claims, images, jobs, keys, previews
from storage.blobs import BlobStore
from storage.database import Database, now
from storage.images import ImageFacts, ImageFile
from storage.keys import KeyLimits
from storage.sweep import remove_unused, sweep_blobs
from storage.tables import ApiKeyRow, BlobRow, ImageFileRow, ImageRow, JobPreviewRow, JobRow

DAY = timedelta(hours=24)


def facts(**changes: Any) -> ImageFacts:
    values: dict[str, Any] = {
        "label": "clora",
        "method": "clora",
        "base_model": "sd",
        "model_id": None,
        "prompt": "a cat and a dog",
        "seed": -(2**63),
        "width": 64,
        "height": 32,
        "recipe": {"seed": 1},
        "report": {"passes": {"full": 3}},
    }
    return ImageFacts(**values | changes)


def file(name: str, content: bytes, **details: Any) -> ImageFile:
    digest = hashlib.sha256(content).hexdigest()
    role: Any = "mask" if details else "image"
    return ImageFile(FileEntry(name, digest, len(content), "image/png"), role, details)


@pytest.fixture
def job_id(database: Database) -> str:
    """A job in its first attempt."""
    with database.write() as session:
        made = jobs.create_job(session, "compose", {}).id
        claims.register_server(session, "srv_1", "boot_1", "here", [])
        claim = claims.claim_next(session, server_id="srv_1", boot_id="boot_1", slot="cpu:0", lease_seconds=60)
        assert claim is not None
        return made


def add(database: Database, job_id: str, *files: ImageFile, **options: Any) -> str:
    with database.write() as session:
        return images.add_image(session, facts(), files, job_id=job_id, **options).id


def test_what_is_added_is_found_with_its_files_in_order(database: Database, job_id: str) -> None:
    image_id = add(database, job_id, file("image.png", b"abc"), file("a-mask.png", b"de", concept="cat", step=0))
    assert image_id.startswith("img_")
    with database.read() as session:
        row = images.get_image(session, image_id)
        assert (row.seed, row.prompt, row.size, row.recipe) == (-(2**63), "a cat and a dog", 5, {"seed": 1})
        assert [item.name for item in row.files] == ["image.png", "a-mask.png"]
        assert row.files[1].details == {"concept": "cat", "step": 0}
        assert images.get_file(session, image_id, "a-mask.png").role == "mask"
        with pytest.raises(NotFound, match=r"no file 'b\.png'") as raised:
            images.get_file(session, image_id, "b.png")
        assert "image.png, a-mask.png" in (raised.value.hint or "")
        for wrong in ("img_0", "a\0b"):
            with pytest.raises(NotFound):
                images.get_image(session, wrong)


def test_a_list_is_of_all_or_of_one_job_and_a_deleted_image_is_gone(database: Database, job_id: str) -> None:
    with database.write() as session:
        other = jobs.create_job(session, "compose", {}).id
    mine = [add(database, job_id, file("image.png", bytes([number])), position=number) for number in range(3)]
    theirs = add(database, other, file("image.png", b"x"))
    with database.write() as session:
        images.delete_image(session, mine[1])
        with pytest.raises(NotFound):
            images.delete_image(session, mine[1])
    with database.read() as session:
        assert {row.id for row in images.list_images(session).items} == {mine[0], mine[2], theirs}
        assert [row.id for row in images.list_images(session, job_id=job_id).items] == [mine[2], mine[0]]
        first = images.list_images(session, job_id=job_id, limit=1)
        rest = images.list_images(session, job_id=job_id, limit=1, cursor=first.next)
        assert [row.id for row in (*first.items, *rest.items)] == [mine[2], mine[0]]
        with pytest.raises(NotFound):
            images.get_image(session, mine[1])


def test_the_key_that_made_it_pays_until_it_is_deleted(database: Database, job_id: str) -> None:
    with database.write() as session:
        key_id = keys.create_key(session, "ci", ["write"], limits=KeyLimits(max_bytes=5))[0].id
    image_id = add(database, job_id, file("image.png", b"abc"), created_by=key_id)
    with pytest.raises(QuotaExceeded):
        add(database, job_id, file("image.png", b"abcd"), created_by=key_id)
    with database.write() as session:
        assert session.get_one(ApiKeyRow, key_id).stored_bytes == 3
        images.delete_image(session, image_id)
    with database.read() as session:
        assert session.get_one(ApiKeyRow, key_id).stored_bytes == 0
        assert len(session.scalars(select(ImageRow)).all()) == 1, "what did not fit left nothing"


def test_the_sweep_keeps_what_images_show_and_gives_up_deleted_ones_after_a_day(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    contents = (b"kept", b"shared", b"gone")
    for content in contents:
        blobs.put_bytes(content)
    kept = add(database, job_id, file("image.png", contents[0]), file("mask.png", contents[1], step=0))
    gone = add(database, job_id, file("image.png", contents[2]), file("mask.png", contents[1], step=0))

    def age() -> None:
        with database.write() as session:
            moment = now(session) - 2 * DAY
            session.execute(update(BlobRow).values(created_at=moment))
            session.execute(update(ImageRow).where(ImageRow.deleted_at.is_not(None)).values(deleted_at=moment))

    age()
    assert sweep_blobs(database, blobs, older_than=timedelta(0)).deleted == ()
    assert not remove_unused(database, blobs, hashlib.sha256(contents[0]).hexdigest())
    with database.write() as session:
        images.delete_image(session, gone)
    assert sweep_blobs(database, blobs).images_forgotten == 0, "it was deleted just now"
    age()
    planned = sweep_blobs(database, blobs, dry_run=True)
    assert planned.images_forgotten == 1
    # the store's own clock knows nothing of the two days: what is swept here is by the rows alone
    report = sweep_blobs(database, blobs, older_than=timedelta(microseconds=1))
    assert (report.images_forgotten, report.deleted) == (1, (hashlib.sha256(contents[2]).hexdigest(),))
    with database.read() as session:
        assert session.scalars(select(ImageRow.id)).all() == [kept]
        assert {row.image_id for row in session.scalars(select(ImageFileRow))} == {kept}


def show(database: Database, job_id: str, step: int, attempt: int = 1, data: bytes = b"picture") -> None:
    with database.write() as session:
        previews.record_preview(session, job_id, attempt, step=step, total=9, data=data, media_type="image/jpeg")


def test_the_newest_preview_takes_the_place_of_the_one_before_with_an_event_each(
    database: Database, job_id: str
) -> None:
    show(database, job_id, 1)
    show(database, job_id, 2, data=b"later")
    with database.read() as session:
        row = previews.get_preview(session, job_id)
        assert (row.step, row.data, row.media_type) == (2, b"later", "image/jpeg")
        told = [event.data for event in jobs.events_after(session, job_id, 0) if event.type == "preview"]
    assert [event["step"] for event in told] == [1, 2]
    assert told[0]["link"] == f"/jobs/{job_id}/preview"
    with pytest.raises(ValueError, match="at most"):
        show(database, job_id, 3, data=b"x" * (previews.MAX_BYTES + 1))


def test_nobody_shows_a_preview_of_a_job_that_is_not_theirs(database: Database, job_id: str) -> None:
    with pytest.raises(AttemptStale):
        show(database, job_id, 1, attempt=2)
    with database.write() as session:
        jobs.request_cancel(session, job_id)
    with pytest.raises(AttemptCancelled):
        show(database, job_id, 1)
    with database.read() as session, pytest.raises(NotFound, match="has no preview"):
        previews.get_preview(session, job_id)


def test_previews_of_ended_jobs_go_after_a_day(database: Database, blobs: BlobStore, job_id: str) -> None:
    show(database, job_id, 1)
    with database.write() as session:
        claims.finish_failed(session, job_id, 1, {"code": "x", "detail": "y"})
    sweep_blobs(database, blobs)
    with database.write() as session:
        assert previews.get_preview(session, job_id).step == 1
        session.execute(update(JobRow).values(finished_at=now(session) - 2 * DAY))
    sweep_blobs(database, blobs)
    with database.read() as session:
        assert session.scalars(select(JobPreviewRow)).all() == []
