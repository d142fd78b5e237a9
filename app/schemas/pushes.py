"""The body of POST /adapters/{id}/push, and the parameters of its job."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.dependencies import HEX_ID, PLAIN
from app.schemas.common import RequestModel
from app.schemas.imports import BucketName, HubRevision, RelativePath, TokenName
from app.schemas.models import HubId
from app.schemas.resources import Resources
from artifacts.peft_config import MAX_RANK
from storage.downloads import DownloadDtype, DownloadFormat

_BRANCHES: list[Any] = [
    {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in ("hub", "oci")
]
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]


class HubTarget(RequestModel):
    """A repository of the hub that the server uses; it is made if it is not there."""

    repo: HubId = Field(description="owner/name; the settings say which owners.")
    revision: HubRevision = Field("main", description="Branch; it is made if it is not there.")
    path: RelativePath | None = Field(None, description="Folder in the repository; unset: the top.")
    private: Annotated[bool, Field(strict=True)] = Field(
        True, description="A repository that is made is private; one that is there and public is refused."
    )
    token: TokenName | None = Field(
        None, description="Name of a token in the server's settings, never a token; unset: the one called default."
    )
    message: Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=PLAIN)] | None = Field(
        None, description="Of the commit."
    )


class PushBucket(RequestModel):
    """Where an OCI layout lies."""

    bucket: BucketName
    prefix: RelativePath


class OciTarget(RequestModel):
    """An OCI image layout below a prefix of a bucket; other tags that it holds stay."""

    s3: PushBucket
    tag: Tag = "latest"


class Push(RequestModel):
    """Where an adapter goes, and as what: exactly one of `hub` and `oci`."""

    hub: HubTarget | None = None
    oci: OciTarget | None = None
    format: DownloadFormat = Field("peft", description="As of a download; of peft the files of the directory are sent.")
    dtype: DownloadDtype | None = Field(None, description="Of the factors; unset: as they are stored.")
    rank: Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)] | None = Field(
        None, description="A smaller rank, as of a download."
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.hub is None) == (self.oci is None):
            raise ValueError("give exactly one of hub and oci")
        return self


class PushParams(Push):
    """Send an adapter elsewhere."""

    adapter: Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]


class PushRequest(Push):
    """A push, and what it may ask of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": _BRANCHES, "example": {"hub": {"repo": "acme/my-lora", "private": True}}}
    )

    resources: Resources | None = None
