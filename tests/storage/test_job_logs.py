"""Pieces of logs, and the text of logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import NotFound
from storage import claims, job_logs, jobs, log_text
from storage.database import Database
from storage.job_logs import Piece
from storage.log_text import HEAD_BYTES, LIMIT, MARK_WINDOW, TAIL_BYTES, KeptText


@pytest.fixture
def running(database: Database) -> tuple[str, int]:
    """A job in its first attempt."""
    with database.write() as session:
        jobs.create_job(session, "merge", {})
    return claim(database)


def claim(database: Database) -> tuple[str, int]:
    with database.write() as session:
        found = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=600)
    assert found is not None
    return found.job_id, found.attempt


def test_pieces_come_back_in_order_from_an_offset(database: Database, running: tuple[str, int]) -> None:
    with database.write() as session:
        assert job_logs.append_pieces(session, *running, [Piece(0, "Grüße\n"), Piece(8, "two\n")])
    with database.write() as session:
        assert job_logs.append_pieces(session, *running, [Piece(8, "two and more\n")])
    with database.read() as session:
        pieces = job_logs.pieces_from(session, *running, 0)
        assert pieces == [Piece(0, "Grüße\n"), Piece(8, "two and more\n")]
        assert (pieces[0].end, pieces[1].end) == (8, 21)
        assert job_logs.pieces_from(session, *running, 8) == pieces[1:]
        assert job_logs.pieces_from(session, *running, 0, limit=1) == pieces[:1]
        assert job_logs.pieces_from(session, *running, job_logs.LARGEST_OFFSET + 1) == []
        assert job_logs.live_bytes(session) == 6 + 13


def test_a_stale_attempt_writes_no_piece(database: Database, running: tuple[str, int]) -> None:
    job_id, attempt = running
    with database.write() as session:
        error = {"code": "worker_crashed", "detail": "it did"}
        claims.requeue(session, job_id, attempt, delay_seconds=0, error=error, exit=None)
        assert not job_logs.append_pieces(session, job_id, attempt, [Piece(0, "late\n")])
    assert claim(database) == (job_id, attempt + 1)
    with database.write() as session:
        assert not job_logs.append_pieces(session, job_id, attempt, [Piece(0, "late\n")])
        assert job_logs.append_pieces(session, job_id, attempt + 1, [Piece(0, "new\n")])
        assert job_logs.live_bytes(session) == 4


def test_the_middle_of_a_long_log_is_dropped(database: Database, running: tuple[str, int]) -> None:
    step = 1 << 20
    with database.write() as session:
        for offset in range(0, 20 * step, step):
            job_logs.append_pieces(session, *running, [Piece(offset, "x" * step)])
    with database.read() as session:
        starts = [piece.offset // step for piece in job_logs.pieces_from(session, *running, 0, 100)]
    # The head is a little shorter than 8 MiB, so its last piece reaches beyond it.
    assert starts == [*range(8), *range(13, 20)]


def test_pieces_are_dropped_by_attempt(database: Database, running: tuple[str, int]) -> None:
    with database.write() as session:
        job_logs.append_pieces(session, *running, [Piece(0, "one\n")])
        job_logs.drop_pieces(session, running[0], running[1] + 1)
        assert job_logs.live_bytes(session) == 4
        job_logs.drop_pieces(session, *running)
        assert job_logs.live_bytes(session) == 0


def test_the_state_of_a_log(database: Database) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "merge", {}).id
        with pytest.raises(NotFound, match="has not run"):
            job_logs.log_state(session, job_id)
        with pytest.raises(NotFound, match="no job"):
            job_logs.log_state(session, f"job_{'0' * 32}")
    _, attempt = claim(database)
    with database.write() as session:
        state = job_logs.log_state(session, job_id)
        assert (state.attempt, state.sha256, state.ended_since) == (1, None, None)
        with pytest.raises(NotFound, match="no attempt 2"):
            job_logs.log_state(session, job_id, 2)
        claims.finish_succeeded(session, job_id, attempt, {"adapters": [], "images": [], "report": {}})
        claims.record_log(session, job_id, attempt, "a" * 64)
        ended = job_logs.log_state(session, job_id, 1)
    assert ended.sha256 == "a" * 64
    assert ended.ended_since is not None
    assert 0 <= ended.ended_since < 60


def test_text_has_as_many_bytes_as_were_written() -> None:
    data = b"ok \xff\xfe \x00 \xe2\x82 \xf0\x9f\x98\x80 \xc3"
    text = log_text.decode(data)
    assert text == "ok ?? ? ?? 😀 ?"
    assert len(text.encode()) == len(data)


@pytest.mark.parametrize("cut", range(12))
def test_text_decoded_in_two_parts_is_the_same(cut: int) -> None:
    data = "a€é😀\0x".encode()
    text, taken = log_text.decode_start(data[:cut])
    rest, last = log_text.decode_start(data[taken:])
    assert taken <= cut
    assert taken + last == len(data)
    assert text + rest == log_text.decode(data)


def test_an_invalid_end_is_not_waited_for_for_ever() -> None:
    assert log_text.decode_start(b"a\xff") == ("a?", 2)
    assert log_text.decode_start(b"a\xe2\x82") == ("a", 1)
    assert log_text.decode_start(b"") == ("", 0)


def kept_text(path: Path) -> tuple[bytes, KeptText]:
    data = log_text.read_bounded(path)
    return data, KeptText.of(len(data), data[HEAD_BYTES : HEAD_BYTES + MARK_WINDOW])


@pytest.mark.parametrize("beyond", [0, 1, 5000])
def test_a_reader_of_the_live_log_goes_on_in_the_kept_one(tmp_path: Path, beyond: int) -> None:
    path = tmp_path / "log"
    size = LIMIT + beyond
    whole = bytes(48 + number * 7919 % 75 for number in range(1009)) * (size // 1009 + 1)
    path.write_bytes(whole[:size])
    data, kept = kept_text(path)
    assert len(data) <= LIMIT
    for offset in (0, 100, HEAD_BYTES, HEAD_BYTES + 1, size - TAIL_BYTES, size - TAIL_BYTES + 9, size - 1, size):
        missing, start = kept.resume(offset)
        if beyond and offset <= HEAD_BYTES:
            assert missing == 0
            assert data[start:] == data[offset:]
        else:
            assert data[start:] == whole[offset + missing : size]
            assert missing == (max(0, size - TAIL_BYTES - offset) if beyond else 0)


def test_a_log_that_only_looks_cut_is_not(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * HEAD_BYTES + log_text.mark(9).encode() + b"y" * 100)
    data, kept = kept_text(path)
    assert kept == KeptText(len(data))


@pytest.mark.parametrize("number", [1, 10**19])
def test_no_mark_is_longer_than_its_window(number: int) -> None:
    assert len(log_text.mark(number).encode()) <= MARK_WINDOW
    assert HEAD_BYTES + TAIL_BYTES + MARK_WINDOW <= LIMIT


def test_an_unreadable_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        log_text.read_bounded(tmp_path / "absent")


def test_pieces_of_any_text_can_be_stored(database: Database, running: tuple[str, Any]) -> None:
    text = log_text.decode(bytes(range(256)) * 4)
    with database.write() as session:
        job_logs.append_pieces(session, *running, [Piece(0, text)])
    with database.read() as session:
        assert job_logs.pieces_from(session, *running, 0) == [Piece(0, text)]
