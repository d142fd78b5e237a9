"""An adapter's files brought here from where they are: a hub, a URL or a bucket; and the record of where that was."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from artifacts.errors import RequestInvalid
from artifacts.pointers import pointers_below
from storage.buckets import Bucket
from workers import hub_source
from workers.folder_choice import RemoteFile, choose
from workers.remote_client import Address, ReceivedFile, RemoteClient, check_digest, too_large
from workers.remotes import Remotes
from workers.watched_work import WATCH_SECONDS, out_of_time, watched

Tell = Callable[[int, int | None], None]
"""Given the bytes that are here and all of them, if that is known; raises to stop."""
T = TypeVar("T")
_NAME_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """The files with the names that they have there, what the adapter may be called, and where it is from (JSON)."""

    files: tuple[tuple[str, ReceivedFile], ...]
    title: str
    origin: Mapping[str, Any]


def fetch(
    source: Mapping[str, Any], remotes: Remotes, folder: Path, tell: Tell, check_stop: Callable[[], None]
) -> FetchedAdapter:
    """Fetch the files that `source` names ({hub} | {url} | {s3}, and {sha256}) into the new `folder`.

    Args:
        check_stop: raises when the job is to stop; asked while a server is silent, too.

    Raises:
        RequestInvalid and its kin: it is not allowed, not there, too large, or has another digest.
        RemoteUnavailable, BlobStoreUnavailable: trying again may help.
    """
    folder.mkdir(parents=True)
    if source.get("s3") is not None:
        s3, sha256 = source["s3"], source.get("sha256")
        fetch_all = partial(_from_bucket, s3, sha256, remotes, folder, tell)
        with pointers_below("/s3/prefix" if s3.get("key") is None else "/s3/key", instead_of="/s3/key"):
            return watched(fetch_all, remotes.timeout_seconds, check_stop, "fetched")
    if source.get("hub") is not None:
        work = _from_hub(source["hub"], source.get("sha256"), remotes, folder, tell)
    else:
        work = _from_url(source["url"], source.get("sha256"), remotes, folder, tell)
    return asyncio.run(_watched(work, remotes.timeout_seconds, check_stop))


async def _watched(work: Coroutine[Any, Any, T], seconds: float, check_stop: Callable[[], None]) -> T:
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(seconds):
            while not (await asyncio.wait({task}, timeout=WATCH_SECONDS))[0]:
                check_stop()
    except TimeoutError as error:
        raise out_of_time("fetched", seconds) from error
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return task.result()


async def _from_hub(
    hub: Mapping[str, Any], sha256: str | None, remotes: Remotes, folder: Path, tell: Tell
) -> FetchedAdapter:
    address, token = remotes.check_hub(), remotes.hub_token(hub.get("token"))
    repo, revision, path = hub["repo"], hub["revision"], hub.get("path")
    async with RemoteClient(remotes.policy, trusted=address) as client:
        found = await hub_source.look_up(client, remotes, repo, revision, path, token)
        total = sum(file.size or 0 for file in found.files)
        if total > remotes.max_bytes:
            raise too_large("/hub", total, remotes.max_bytes)
        received: list[tuple[str, ReceivedFile]] = []
        done = 0
        for number, file in enumerate(found.files):
            got = await client.download(
                hub_source.address_of(remotes, repo, found.commit, file, token),
                folder / f"file-{number:04d}",
                remotes.max_bytes - done,
                lambda size, _, before=done: tell(before + size, total or None),  # type: ignore[misc]
            )
            check_digest("/hub", file.path, got.sha256, file.sha256)
            received.append((file.path, got))
            done += got.size
    _check_alone(received, sha256)
    origin = {"kind": "hub", "hub": address, "repo": repo, "revision": found.commit, "asked": revision, "path": path}
    parent = PurePosixPath(path or "")
    title = parent.stem if path and parent.suffix else parent.name or repo.rpartition("/")[2]
    return FetchedAdapter(_named(received), title, {**origin, "files": _listed(received)})


async def _from_url(url: str, sha256: str | None, remotes: Remotes, folder: Path, tell: Tell) -> FetchedAdapter:
    async with RemoteClient(remotes.policy, tokens=remotes.host_tokens) as client:
        got = await client.download(
            Address(url, "/url", remotes.check_url), folder / "file-0000", remotes.max_bytes, tell
        )
    shown, _, query = url.partition("?")
    name = _printable(got.name or PurePosixPath(unquote(urlsplit(url).path)).name) or "file"
    received = [(name, got)]
    _check_alone(received, sha256)
    # A query may hold a secret: that there was one is all that is kept.
    origin = {"kind": "url", "url": shown, "query": bool(query), "etag": got.etag}
    return FetchedAdapter(tuple(received), PurePosixPath(name).stem, {**origin, "files": _listed(received)})


def _from_bucket(
    s3: Mapping[str, Any], sha256: str | None, remotes: Remotes, folder: Path, tell: Tell
) -> FetchedAdapter:
    key: str | None = s3.get("key")
    prefix: str = s3.get("prefix") or ""
    remotes.check_bucket(s3["bucket"], prefix if key is None else key)
    bucket = Bucket(s3["bucket"])
    if key is not None:
        objects = [bucket.find(key)]
    else:
        there = {item.key: item for item in bucket.children(prefix)}
        objects = [there[file.path] for file in choose([RemoteFile(key) for key in there], prefix, "/s3/prefix")]
    total = sum(item.size for item in objects)
    if total > remotes.max_bytes:
        raise too_large("/s3", total, remotes.max_bytes)
    received: list[tuple[str, ReceivedFile]] = []
    done = 0
    for number, item in enumerate(objects):
        path, digest = folder / f"file-{number:04d}", hashlib.sha256()
        with path.open("wb") as file:
            for chunk in bucket.read(item):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                tell(done, total)
        received.append((item.key, ReceivedFile(path, digest.hexdigest(), item.size, None, item.etag)))
    _check_alone(received, sha256)
    origin = {"kind": "s3", "bucket": bucket.name, "key": key, "prefix": prefix or None}
    title = PurePosixPath(prefix).name if key is None else PurePosixPath(key).stem
    return FetchedAdapter(_named(received), title or bucket.name, {**origin, "files": _listed(received)})


def _check_alone(received: list[tuple[str, ReceivedFile]], sha256: str | None) -> None:
    """Raises RequestInvalid and FileBroken: a digest was given, and it is not that of the one file."""
    if sha256 is None:
        return
    if len(received) != 1:
        raise RequestInvalid(
            f"sha256 is that of one file, and there are {len(received)}.", hint="Name one file by its path or key."
        )
    name, file = received[0]
    check_digest("/sha256", name, file.sha256, sha256)


def _printable(name: str) -> str:
    """A name that somebody else chose, as a person may read it: only what is printed, and not too long."""
    return "".join(character if character.isprintable() else "?" for character in name)[-_NAME_CHARACTERS:]


def _named(received: list[tuple[str, ReceivedFile]]) -> tuple[tuple[str, ReceivedFile], ...]:
    return tuple((PurePosixPath(name).name, file) for name, file in received)


def _listed(received: list[tuple[str, ReceivedFile]]) -> list[dict[str, Any]]:
    return [{"path": name, "sha256": file.sha256, "size": file.size} for name, file in received]
