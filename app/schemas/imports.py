"""The body of POST /adapters/import, and the parameters of its job."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from app.dependencies import PLAIN
from app.schemas.adapters import AdapterForm
from app.schemas.common import RequestModel
from app.schemas.models import HubId
from app.schemas.resources import Resources

_BRANCHES: list[Any] = [
    {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in ("hub", "url", "s3")
]


def _relative(value: str) -> str:
    if any(part in ("", ".", "..") for part in value.strip("/").split("/")):
        raise ValueError("must be a relative path without empty parts, . and ..")
    return value.strip("/")


HubRevision = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PLAIN)]
TokenName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
RelativePath = Annotated[
    str, StringConstraints(min_length=1, max_length=1000, pattern=PLAIN), AfterValidator(_relative)
]
BucketName = Annotated[str, StringConstraints(min_length=3, max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$")]


class HubSource(RequestModel):
    """An adapter on the hub that the server uses."""

    repo: HubId = Field(description="Name of the repository.")
    revision: HubRevision = Field("main", description="Branch, tag or commit; what is kept is the commit.")
    path: RelativePath | None = Field(None, description="A file, or the folder of the adapter; unset: the top.")
    token: TokenName | None = Field(
        None, description="Name of a token in the server's settings, never a token; unset: the one called default."
    )


class BucketSource(RequestModel):
    """An adapter in a bucket that the server may read: one object, or all right under a prefix."""

    bucket: BucketName
    key: RelativePath | None = None
    prefix: RelativePath | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.key is None) == (self.prefix is None):
            raise ValueError("give either key or prefix")
        return self


class ImportSource(RequestModel):
    """Where an adapter is: exactly one of `hub`, `url` and `s3`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _BRANCHES})

    hub: HubSource | None = None
    url: Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=PLAIN)] | None = Field(
        None, description="One file or archive, on a host that the server may fetch from."
    )
    s3: BucketSource | None = None
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="Of the one file that is fetched; another one is refused."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(part is not None for part in (self.hub, self.url, self.s3)) != 1:
            raise ValueError("give exactly one of hub, url and s3")
        return self


def shown_params(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a job as answers show them: the query of an import's URL may hold a secret, which is for the
    worker alone."""
    source = params.get("source")
    if kind != "import" or not isinstance(source, dict) or not isinstance(source.get("url"), str):
        return params
    return {**params, "source": {**source, "url": source["url"].partition("?")[0]}}


class ImportParams(AdapterForm):
    """Fetch an adapter and take it in like an upload."""

    source: ImportSource


class ImportRequest(ImportParams):
    """An import, and what it may ask of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"source": {"hub": {"repo": "acme/my-lora", "revision": "main"}}, "name": "mine"}}
    )

    resources: Resources | None = None
