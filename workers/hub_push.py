"""Adapters sent to a hub: one commit with all files, in a repository that is as private as was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from artifacts.errors import FieldError, RemoteUnavailable, RequestInvalid
from workers.hub_calls import answered_status, plain_transfers
from workers.pushed_files import PushedFile
from workers.remote_client import is_passing
from workers.watched_work import watched


@dataclass(frozen=True, slots=True)
class HubTarget:
    """Where to: the hub's address and token, repository, branch, folder in it, and whether it may be public."""

    hub: str
    token: str
    repo: str
    revision: str
    path: str | None
    private: bool


def push(
    target: HubTarget,
    files: Sequence[PushedFile],
    message: str,
    *,
    timeout_seconds: float,
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Make the repository and the branch if they are not there, and commit the files. Files that are the same there
    already are not sent.

    Returns:
        {commit, url}.

    Raises:
        RequestInvalid: the hub refuses it, the repository is public and was to be private, or it took too long.
        RemoteUnavailable: the hub is away or busy.
    """
    return watched(lambda: _commit(target, files, message), timeout_seconds, check_stop, "sent")


def _commit(target: HubTarget, files: Sequence[PushedFile], message: str) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=target.hub, token=target.token)
    with plain_transfers(), _translated(target):
        api.create_repo(target.repo, private=target.private, exist_ok=True)
        if target.private and not api.repo_info(target.repo).private:
            problem = f"{target.repo} is there and is public"
            raise RequestInvalid(
                f"{problem}.",
                hint="Send private: false if everybody may see the adapter.",
                errors=[FieldError("/hub/private", problem)],
            )
        if target.revision != "main":
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        folder = "" if target.path is None else f"{target.path}/"
        operations = [CommitOperationAdd(f"{folder}{file.name}", str(file.path)) for file in files]
        made = api.create_commit(target.repo, operations, commit_message=message, revision=target.revision)
    return {"commit": made.oid, "url": f"{target.hub}/{target.repo}/tree/{made.oid}"}


@contextmanager
def _translated(target: HubTarget) -> Iterator[None]:
    """Failures of the hub as errors of our tree. Nothing of a request is in them, for it may hold the token."""
    from httpx2 import HTTPError  # what huggingface_hub sends with, and the base of its own errors
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise RequestInvalid(
            "Nothing is sent to a hub: HF_HUB_OFFLINE is set where this service's workers run.",
            hint="Whoever runs the service can unset it.",
        ) from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        status = answered_status(error)
        if status is not None and not is_passing(status):
            _refuse(target, status)
        if isinstance(error, HFValidationError):  # by the rules of the client itself: nothing was sent
            problem = f"{target.repo} at {target.revision} is no repository, or no branch, that hubs have"
            raise RequestInvalid(f"{problem}.", hint=str(error), errors=[FieldError("/hub", problem)]) from error
        what = f"it answered {status}" if status is not None else type(error).__name__
        raise RemoteUnavailable(f"Sending to {target.hub}/{target.repo} failed: {what}.") from error


def _refuse(target: HubTarget, status: int) -> NoReturn:
    problem = f"the hub answered {status}"
    raise RequestInvalid(
        f"{target.hub} does not take {target.repo}: it answered {status}.",
        hint="May the token write to that namespace?" if status in (401, 403, 404) else None,
        errors=[FieldError("/hub/repo", problem)],
    )
