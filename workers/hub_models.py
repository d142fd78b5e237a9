"""The files of a base model that lies on a hub, for jobs that read and change its weights as they are stored."""

from __future__ import annotations

from pathlib import Path

from artifacts.base_model import PIPELINE_INDEX
from artifacts.errors import FieldError, RequestInvalid
from artifacts.model_folder import CARRIED
from workers.base_models import ModelSource


def local_folder(source: ModelSource) -> Path:
    """The folder of a transformers model; a repository is downloaded if it is not in the hub's own cache, as it is for
    a training: its weights in safetensors, its configuration and tokenizer, and no code.

    Raises:
        RequestInvalid: it can not be had, or is a diffusers pipeline.
    """
    folder = Path(source.location)
    if not folder.is_absolute():
        folder = _downloaded(source)
    if (folder / PIPELINE_INDEX).is_file():
        raise _refused(source, "it is a diffusers pipeline")
    return folder


def _downloaded(source: ModelSource) -> Path:
    from httpx2 import HTTPError  # what huggingface_hub sends with
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionResolutionError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # they are for a terminal; here they would fill logs
    try:
        found = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in CARRIED)],
            # parts of other models, and the same weights for other programs
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HTTPError, OSError, RevisionResolutionError, ValueError) as error:
        raise _refused(source, f"it can not be had from the hub: {str(error).rstrip('.')}") from error
    return Path(found)


def _refused(source: ModelSource, problem: str) -> RequestInvalid:
    return RequestInvalid(
        f"The base model {source.name!r} can not be merged into: {problem}.",
        hint="Is the worker allowed to reach the hub and to read that repository? A folder of the server needs no hub.",
        errors=[FieldError("/base_model", problem)],
    )
