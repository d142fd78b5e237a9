"""Adapters on a hub: a revision pinned to its commit, and the files of one folder that belong to an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from artifacts.errors import RemoteUnavailable
from workers.folder_choice import RemoteFile, choose
from workers.remote_client import Address, RemoteClient
from workers.remotes import Remotes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True, slots=True)
class HubFolder:
    """What is to be fetched of a repository at a commit."""

    commit: str
    files: tuple[RemoteFile, ...]


async def look_up(
    client: RemoteClient, remotes: Remotes, repo: str, revision: str, path: str | None, token: str | None
) -> HubFolder:
    """What an adapter at `path` (a file or a folder; None: the top) of a repository consists of.

    Raises:
        RequestInvalid: there is no such repository or revision, or it is not for this server.
        FormatUnknown: there is no adapter at that place.
        RemoteUnavailable: the hub does not answer as hubs do.
    """
    url = f"{remotes.check_hub()}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    document = await client.json(Address(url, "/hub", lambda _: None, token))
    commit, siblings = _read(document)
    return HubFolder(commit, tuple(choose(siblings, path, "/hub/path")))


def address_of(remotes: Remotes, repo: str, commit: str, file: RemoteFile, token: str | None) -> Address:
    """Where a file of a repository is. What the hub redirects to has to be a public address, and gets no token."""
    url = f"{remotes.check_hub()}/{repo}/resolve/{commit}/{quote(file.path)}"
    return Address(url, "/hub", lambda _: None, token)


def _size(given: Any) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(given)
    return given


def _digest(given: Any) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str) or not _SHA256.fullmatch(given):
        raise ValueError(given)
    return given


def _read(document: Any) -> tuple[str, list[RemoteFile]]:
    """The commit and the files of a hub's answer. Raises RemoteUnavailable: it is not one."""
    try:
        commit = document["sha"]
        if not _COMMIT.fullmatch(commit):
            raise ValueError(commit)
        found = [
            RemoteFile(str(item["rfilename"]), _size(item.get("size")), _digest((item.get("lfs") or {}).get("sha256")))
            for item in document["siblings"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteUnavailable("The hub's answer on the repository is not what hubs answer.") from error
    return commit, found
