"""Whether an adapter may be fetched, from the settings and what the database knows: nothing is asked of its server."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.remotes import remotes_of
from app.schemas.imports import ImportParams
from app.settings import Settings
from artifacts.pointers import pointers_below
from storage.declared_bases import declared_base


def check_import(settings: Settings, session: Session, request: ImportParams, devices: int) -> None:
    """Refuse a source that the settings do not allow.

    Raises:
        RequestInvalid: that, the name of a token that there is not, or the id of a base model that there is not.
    """
    del devices
    remotes, source = remotes_of(settings), request.source
    with pointers_below("/source"):
        if source.hub is not None:
            remotes.check_hub()
            remotes.hub_token(source.hub.token)
        elif source.url is not None:
            remotes.check_url(source.url)
        else:
            assert source.s3 is not None
            remotes.check_bucket(source.s3.bucket, source.s3.key or source.s3.prefix or "")
    declared_base(session, request.base_model)
