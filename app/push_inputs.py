"""Whether an adapter may be sent somewhere, and can be written as what it is to be sent as."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.remotes import remotes_of
from app.schemas.pushes import PushParams
from app.settings import Settings
from app.stored_inputs import stored_adapters
from artifacts.formats.writers import WRITERS
from artifacts.formats.writing import subject_of
from artifacts.manifest import PEFT_FORMATS
from artifacts.pointers import pointers_below
from storage import adapters

_NEEDS_BASE = "gguf"


def check_push(settings: Settings, session: Session, request: PushParams, devices: int) -> None:
    """Refuse a target that the settings do not allow, and a format that can not hold the adapter.

    Raises:
        RequestInvalid: that, or there is no such adapter.
    """
    del devices
    remotes = remotes_of(settings)
    if request.hub is not None:
        remotes.check_push_repo(request.hub.repo, request.hub.token)
    elif request.oci is not None:
        with pointers_below("/oci"):
            remotes.check_push_bucket(request.oci.s3.bucket, request.oci.s3.prefix)
    row = stored_adapters(session, [("/adapter", request.adapter)])[request.adapter]
    layout = request.format
    if layout not in WRITERS or layout == _NEEDS_BASE or (layout == "peft" and row.format in PEFT_FORMATS):
        return  # what is stored already, or is known only when the files of the base model are read
    with pointers_below("", instead_of="/query"):
        WRITERS[layout].plan(subject_of(adapters.manifest_of(row), layout, request.rank))
