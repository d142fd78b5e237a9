"""The files of a base model that lies on a hub, for jobs that read and change its weights as they are stored."""

from __future__ import annotations

import glob
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.base_model import PIPELINE_INDEX, indexed_weights
from artifacts.errors import DiskFull, FieldError, RemoteUnavailable, RequestInvalid
from artifacts.model_folder import CARRIED
from storage.faults import is_disk_full
from workers.base_models import ModelSource
from workers.hub_calls import answered_status, causes, plain_transfers
from workers.remote_client import is_passing
from workers.watched_work import watched

_ABSENT = "it can not be had from the hub"
_OTHERS = ["*/*"]  # parts of other models, and the same weights for other programs


def local_folder(source: ModelSource, check_stop: Callable[[], None]) -> Path:
    """The folder of a transformers model; a repository is downloaded if it is not in the hub's own cache, as it is for
    a training: its weights in safetensors, its configuration and tokenizer, and no code.

    Args:
        check_stop: raises when the job is to stop; asked while the hub is silent, too. How long a download may take is
            for the job's own limit of time to say.

    Raises:
        RequestInvalid: the hub does not give it, or it is a diffusers pipeline.
        FileBroken: the index of its weights is not what it must be.
        RemoteUnavailable: the hub is away or busy.
        DiskFull: the hub's cache has no space for it.
    """
    folder = Path(source.location)
    if not folder.is_absolute():
        folder = watched(lambda: _downloaded(source), math.inf, check_stop, "fetched")
    if (folder / PIPELINE_INDEX).is_file():
        raise _refused(source, "it is a diffusers pipeline")
    return folder


def _downloaded(source: ModelSource) -> Path:
    with plain_transfers(), _translated(source):
        folder = _snapshot(source, source.revision, [f"*{suffix}" for suffix in CARRIED])
        # Beside the model's own weights there may be the same ones in other widths, and adapters: as for transformers,
        # those that the index names are the model's, else the one file.
        names = indexed_weights(folder) or ["model.safetensors"]
        patterns = [glob.escape(name) for name in names]
        _check_space(source, folder, patterns)
        return _snapshot(source, folder.name, patterns)


def _snapshot(source: ModelSource, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.location, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHERS))


def _check_space(source: ModelSource, folder: Path, patterns: list[str]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(
            source.location, revision=folder.name, allow_patterns=patterns, ignore_patterns=_OTHERS, dry_run=True
        )
    except DryRunError:  # the hub is not there: what is in the cache is taken, or the failure told
        return
    needed, free = sum(file.file_size or 0 for file in files if file.will_download), shutil.disk_usage(folder).free
    if needed > free:
        raise _no_space(source, f"it needs {needed} bytes, and {free} are free")


def _no_space(source: ModelSource, problem: str) -> DiskFull:
    return DiskFull(
        f"There is no space for the base model {source.name!r} in the hub's cache: {problem}.",
        hint="Free space where HF_HOME of the workers is.",
    )


@contextmanager
def _translated(source: ModelSource) -> Iterator[None]:
    """Failures of the hub as errors of our tree. No address of a request is in them: it may be a signed one."""
    from httpx2 import HTTPError  # what huggingface_hub sends with
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionResolutionError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, RevisionResolutionError, ValueError) as error:
        status = answered_status(error)
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error)):
            raise _refused(source, f"{_ABSENT}: it is not in the cache, and HF_HUB_OFFLINE is set") from error
        if isinstance(error, HFValidationError):
            raise _refused(source, f"{_ABSENT}: {source.location!r} is no name of a repository") from error
        if status is not None and not is_passing(status):
            raise _refused(source, f"{_ABSENT}: it answered {status}") from error
        if any(isinstance(cause, OSError) and is_disk_full(cause) for cause in causes(error)):
            raise _no_space(source, "the disk is full") from error
        what = f"it answered {status}" if status is not None else type(error).__name__
        raise RemoteUnavailable(f"Fetching the base model {source.name!r} from the hub failed: {what}.") from error


def _refused(source: ModelSource, problem: str) -> RequestInvalid:
    return RequestInvalid(
        f"The base model {source.name!r} can not be merged into: {problem}.",
        hint="Is the worker allowed to reach the hub and to read that repository? A folder of the server needs no hub.",
        errors=[FieldError("/base_model", problem)],
    )
