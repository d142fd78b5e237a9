"""How the log of an attempt gets from a file of the worker's machine to those who read it.

While the attempt runs, a thread of its worker process writes what is new in the file to the database about once a
second. When it has ended, however it did, a thread of the process that watches over the worker puts the whole file
into the blob store. Neither ever decides over the job: what can not be delivered now is delivered later.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from artifacts.errors import AttemptStale, BlobStoreUnavailable, DatabaseUnavailable, DiskFull, RankwiseError
from artifacts.manifest import FileEntry
from storage import claims, job_logs, log_text
from storage.blob_rows import reserve_blobs
from storage.blobs import BlobStore
from storage.database import Database
from storage.job_logs import Piece

SHIP_SECONDS = 1.0
LONGEST_SHIP_SECONDS = 30.0
STOP_SECONDS = 5.0
PIECE_BYTES = 128 << 10
PIECES_AT_ONCE = 8

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
LINGER_SECONDS = 5.0
BATCH_FILES = 50
BATCH_BYTES = 32 << 20
MAX_WAITING_FILES = 10_000
MAX_WAITING_BYTES = 2 << 30

LOG_FOLDER = "logs"  # in the work folder of a server
LOG_NAME = re.compile(r"(?P<job>job_[0-9a-f]{32})-(?P<attempt>[1-9]\d{0,8})\.log")
MEDIA_TYPE = "text/plain; charset=utf-8"
_LATER = (DatabaseUnavailable, BlobStoreUnavailable, DiskFull)

log = structlog.get_logger(__name__)


class LogShipper:
    """Sends on what an attempt writes, while it runs. A context manager around the attempt.

    Its thread says nothing: whatever it printed would be in the very log that it reads. `failure` is the last error.

    Args:
        database: gives the database; called from the thread.
    """

    def __init__(
        self,
        path: Path,
        job_id: str,
        attempt: int,
        database: Callable[[], Database],
        every_seconds: float = SHIP_SECONDS,
    ) -> None:
        self.failure: str | None = None
        self._path = path
        self._key = (job_id, attempt)
        self._database = database
        self._every_seconds = every_seconds
        self._offset = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-shipper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        # What it is just doing may hang as long as the database does; the next attempt does not wait for that.
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        wait = self._every_seconds
        while not self._stopping.wait(wait):
            try:
                while self.ship():
                    pass
            except AttemptStale:
                return
            except (RankwiseError, OSError) as error:
                self.failure = str(error)
                wait = min(LONGEST_SHIP_SECONDS, wait * 2)
            except Exception as error:  # a bug in here may cost the live view of the log, never the job
                self.failure = repr(error)
                return
            else:
                wait = self._every_seconds

    def ship(self) -> bool:
        """Write what is new. Returns whether there was more than one turn takes.

        Raises:
            AttemptStale: the attempt is not the current one any more.
            DatabaseUnavailable, DiskFull, OSError: nothing was lost; try again.
        """
        pieces = self._next_pieces()
        if not pieces:
            return False
        with self._database().write() as session:
            current = job_logs.append_pieces(session, *self._key, pieces)
        if not current:
            raise AttemptStale(f"attempt {self._key[1]} of {self._key[0]} is not the current one")
        self._offset = pieces[-1].end
        return len(pieces) == PIECES_AT_ONCE and not self._stopping.is_set()

    def _next_pieces(self) -> list[Piece]:
        size = self._path.stat().st_size
        if size - self._offset > log_text.TAIL_BYTES and self._offset >= log_text.HEAD_BYTES:
            self._offset = size - log_text.TAIL_BYTES  # what lies between would be dropped again at once
        pieces: list[Piece] = []
        offset = self._offset
        with self._path.open("rb") as file:
            file.seek(offset)
            while len(pieces) < PIECES_AT_ONCE and offset <= job_logs.LARGEST_OFFSET:
                text, taken = log_text.decode_start(file.read(PIECE_BYTES))
                if not taken:
                    break
                pieces.append(Piece(offset, text))
                offset += taken
                file.seek(offset)
        return pieces


@dataclass(frozen=True, slots=True)
class FinishedLog:
    """The log file of an attempt that has ended, and where it belongs."""

    path: Path
    job_id: str
    attempt: int
    database_url: str
    blob_url: str


class LogKeeper:
    """Puts the logs of ended attempts into the blob store, from a thread that is there only while there are some.

    A log whose delivery fails stays where it is and is tried again, ever more seldom; of too many that wait, the
    oldest are given up. What is left when the process ends is found by `keep_folder` at the next start.
    """

    def __init__(self) -> None:
        self._waiting: deque[FinishedLog] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._retry_at = 0.0
        self._retry_wait = FIRST_WAIT_SECONDS

    def keep(self, path: Path, database_url: str, blob_url: str) -> None:
        """Take over a log file named <job id>-<attempt>.log. Does not block."""
        name = LOG_NAME.fullmatch(path.name)
        if name is None:
            log.warning("not_a_log_of_an_attempt", path=str(path))
            return
        with self._changed:
            self._waiting.append(FinishedLog(path, name["job"], int(name["attempt"]), database_url, blob_url))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log-keeper", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def keep_folder(self, folder: Path, database_url: str, blob_url: str) -> int:
        """Take over every log file that an earlier process has left in `folder`. Returns how many."""
        if not folder.is_dir():
            return 0
        for path in folder.glob("job_*.cut"):
            path.unlink(missing_ok=True)
        paths = sorted(folder.glob("job_*.log"))
        for path in paths:
            self.keep(path, database_url, blob_url)
        return len(paths)

    @property
    def waiting(self) -> int:
        """Logs that are not delivered yet."""
        with self._changed:
            return len(self._waiting)

    def flush(self, seconds: float) -> bool:
        """Wait until all are delivered, at most `seconds`, and end the thread. Returns whether none is left.

        The files of the others stay.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)
            self._closing = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(max(1.0, deadline - time.monotonic()))
        with self._changed:
            self._closing = False
            left = len(self._waiting)
            self._waiting.clear()
        if left:
            log.warning("logs_not_kept_yet", logs=left, hint="The next start of this server keeps them.")
        return left == 0

    # The rest is called by the thread.

    def _run(self) -> None:
        stores = _Stores()
        try:
            while batch := self._next_batch():
                self._deliver(stores, batch)
        finally:
            stores.close()

    def _next_batch(self) -> list[FinishedLog]:
        """Wait for logs; [] when the thread shall end. They stay in the queue until they are done."""
        with self._changed:
            idle_since = time.monotonic()
            while not self._closing:
                now = time.monotonic()
                if self._waiting and now >= self._retry_at:
                    return self._first_of_one_store()
                if not self._waiting and now - idle_since >= LINGER_SECONDS:
                    break
                self._changed.wait(self._retry_at - now if self._waiting else idle_since + LINGER_SECONDS - now)
            self._thread = None
            return []

    def _first_of_one_store(self) -> list[FinishedLog]:
        first = self._waiting[0]
        batch: list[FinishedLog] = []
        size = 0
        for item in self._waiting:
            if (item.database_url, item.blob_url) != (first.database_url, first.blob_url):
                break
            size += min(_size(item.path), log_text.LIMIT)
            if batch and (len(batch) == BATCH_FILES or size > BATCH_BYTES):
                break
            batch.append(item)
        return batch

    def _deliver(self, stores: _Stores, batch: Sequence[FinishedLog]) -> None:
        try:
            deliver(*stores.of(batch[0]), batch)
        except _LATER as error:
            self._postpone(error.detail)
            self._bound()
            return
        except Exception:
            # A bug, or a file that can not be read: it must not keep the others from being delivered.
            if len(batch) > 1:
                for item in batch:
                    self._deliver(stores, [item])
                return
            log.exception("log_not_kept", log=batch[0].path.name, hint="The next start of this server tries it again.")
        with self._changed:
            done = set(batch)
            self._waiting = deque(item for item in self._waiting if item not in done)
            self._retry_at, self._retry_wait = 0.0, FIRST_WAIT_SECONDS
            self._changed.notify_all()

    def _postpone(self, detail: str) -> None:
        with self._changed:
            if self._retry_wait == FIRST_WAIT_SECONDS:
                log.warning("logs_wait", logs=len(self._waiting), detail=detail)
            self._retry_at = time.monotonic() + self._retry_wait
            self._retry_wait = min(LONGEST_WAIT_SECONDS, self._retry_wait * 2)

    def _bound(self) -> None:
        """Cut the files that wait to what will be kept of them, and give up the oldest of too many."""
        with self._changed:
            waiting = list(self._waiting)
        total = 0
        for number, item in enumerate(reversed(waiting)):
            total += shrink(item.path)
            if number < MAX_WAITING_FILES and total <= MAX_WAITING_BYTES:
                continue
            log.error("log_given_up", log=item.path.name, waiting=len(waiting))
            item.path.unlink(missing_ok=True)
            with self._changed:
                self._waiting.remove(item)


class _Stores:
    """The database and the blob store of the newest batch, opened once."""

    def __init__(self) -> None:
        self._urls: tuple[str, str] | None = None
        self._database: Database | None = None
        self._blobs: BlobStore | None = None

    def of(self, item: FinishedLog) -> tuple[Database, BlobStore]:
        if self._urls != (item.database_url, item.blob_url) or self._database is None or self._blobs is None:
            self.close()
            self._database, self._blobs = Database(item.database_url), BlobStore(item.blob_url)
            self._urls = (item.database_url, item.blob_url)
        return self._database, self._blobs

    def close(self) -> None:
        if self._database is not None:
            self._database.dispose()
        self._urls = self._database = self._blobs = None


def deliver(database: Database, blobs: BlobStore, logs: Sequence[FinishedLog]) -> None:
    """Store what the files hold, note it, drop the pieces, remove the files. Doing it again changes nothing.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable, DiskFull: the files are still there; try again.
    """
    texts = [(item, data) for item in logs if (data := _read(item.path))]
    digests = [hashlib.sha256(data).hexdigest() for _, data in texts]
    if texts:
        with database.write() as session:
            reserve_blobs(
                session,
                [
                    FileEntry(item.path.name, digest, len(data), MEDIA_TYPE)
                    for (item, data), digest in zip(texts, digests, strict=True)
                ],
            )
        for _, data in texts:
            blobs.put_bytes(data)
        with database.write() as session:
            for (item, _), digest in zip(texts, digests, strict=True):
                try:
                    claims.record_log(session, item.job_id, item.attempt, digest)
                except AttemptStale as error:  # of another database, or of one that was restored from a backup
                    log.warning("log_of_no_attempt", log=item.path.name, detail=error.detail)
                job_logs.drop_pieces(session, item.job_id, item.attempt)
    for item in logs:
        item.path.unlink(missing_ok=True)


def clear_work(folder: Path) -> None:
    """Remove what the attempts of an earlier boot have left in their work folder, but their logs."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name == LOG_FOLDER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def shrink(path: Path) -> int:
    """Cut a log file to what is kept of it; returns its size afterwards, 0 if it is gone or can not be read."""
    size = _size(path)
    if size <= log_text.LIMIT:
        return size
    shorter = path.with_suffix(".cut")
    try:
        shorter.write_bytes(log_text.read_bounded(path))
        shorter.replace(path)
    except OSError as error:
        log.warning("log_not_cut", log=path.name, error=str(error))
        shorter.unlink(missing_ok=True)
    return _size(path)


def _read(path: Path) -> bytes:
    """The text of a log, bounded; b"" if nothing was written, or if the file has gone."""
    try:
        return log_text.read_bounded(path)
    except FileNotFoundError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
