"""The one settings class. Every field has a default that runs, and an environment variable `RANKWISE_<NAME>`."""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from workers.remotes import HUB

GIB = 1024**3


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _off_is_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() == "off" else value


def _http_address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ValueError("must be an address such as https://huggingface.co")
    return value.rstrip("/")


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return tuple(json.loads(value))
    return tuple(part.strip() for part in value.split(",") if part.strip())


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
HttpAddress = Annotated[str, AfterValidator(_http_address)]
CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]


class Settings(BaseSettings):
    """Settings of the server, the worker and the command line.

    Raises:
        pydantic.ValidationError: a value out of range, or another bind address than loopback with `api_keys` off.
    """

    model_config = SettingsConfigDict(env_prefix="RANKWISE_", extra="forbid", frozen=True, env_ignore_empty=True)

    data_dir: AbsolutePath = Field(
        Path("rankwise-data"), validate_default=True, description="Folder of the database, the blobs and all scratch."
    )
    database_url: str = Field("", description="SQLAlchemy URL; unset: SQLite in the data folder.")
    blob_url: str = Field("", description="file://, s3://, gs://, az:// or memory://; unset: the data folder.")
    pool: Literal["local", "ray", "off"] = Field(
        "local",
        description="local: worker processes of this server; ray: worker processes on the nodes of a Ray cluster; "
        "off: only other `rankwise worker` processes.",
    )
    devices: str = Field(
        "auto", description="Device slots of the pool: auto, cpu:2, cuda:0,1; on Ray auto, gpu:8, cpu:2."
    )
    ray_address: str = Field(
        "", description="Ray cluster: ray://<head>:10001, <head>:6379 on a node of it; unset: RAY_ADDRESS, or auto."
    )
    ray_work_dir: str = Field(
        "", description="Folder on each Ray node for scratch, cache and logs; unset: one among the temporary files."
    )
    ray_slot_resources: dict[str, float] = Field(
        {}, description='What one slot reserves in Ray, as {"GPU": 1, "CPU": 4}; unset: a GPU, rankwise_slot or CPU.'
    )
    warm_bytes: int | None = Field(
        None,
        ge=0,
        description="Base models that a worker keeps in memory, bytes; unset: 60 % of its CUDA device, or 25 % of the "
        "main memory, shared by the slots.",
    )
    model_roots: Annotated[tuple[AbsolutePath, ...], NoDecode] = Field(
        (), description=f"Folders under which local base models may be registered, separated by {os.pathsep!r}."
    )
    safety_checker: Annotated[AbsolutePath | None, BeforeValidator(_off_is_none)] = Field(
        None,
        description="Folder safety_checker of a Stable Diffusion pipeline, which every composed image is shown to "
        "before it is given out; off or unset: images are not checked.",
    )
    host: str = Field("127.0.0.1", description="Bind address. Another than loopback needs api_keys on.")
    port: int = Field(8000, ge=0, le=65535)
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="`rankwise worker` answers /metrics on this port of the bind address, no key; 0: no.",
    )
    api_keys: bool = Field(False, description="on: every call but the health checks and the docs needs an API key.")
    max_upload_bytes: int = Field(8 * GIB, ge=1, description="Largest upload, all its files together, in bytes.")
    max_body_bytes: int = Field(1024**2, ge=1024, description="Largest JSON body, in bytes.")
    max_queued_jobs: int = Field(1000, ge=1, description="Jobs that may wait; further ones get 429.")
    max_wait_seconds: float = Field(60.0, ge=0, le=600, description="Longest `Prefer: wait` that is honoured.")
    lease_seconds: float = Field(60.0, gt=0, description="A job whose worker is silent this long is given away.")
    beat_seconds: float = Field(15.0, gt=0, description="Interval of the supervisor's sign of life.")
    grace_seconds: float = Field(30.0, ge=0, description="Time to stop in, between SIGTERM and SIGKILL.")
    webhook_allow_http: bool = Field(False, description="on: webhooks may go to http:// addresses, beside https://.")
    webhook_allowed_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        (), description="Networks that are not public and that webhooks may go to, as 10.0.0.0/8,127.0.0.1."
    )
    hub_endpoint: Annotated[HttpAddress | None, BeforeValidator(_off_is_none)] = Field(
        HUB,
        validate_default=True,
        description="Hub that adapters are fetched from and sent to; it speaks huggingface.co's protocol. off: none.",
    )
    hub_tokens: dict[str, SecretStr] = Field(
        {}, description='Tokens of the hub by names of yours, as {"default": "hf_…"}; jobs give a name, never a token.'
    )
    import_hosts: CommaSeparated = Field(
        (), description="Hosts of URLs that adapters may be fetched from, as civitai.com,*.example.org; * is any."
    )
    import_tokens: dict[str, SecretStr] = Field(
        {},
        description='Tokens by host, as {"civitai.com": "…"}: sent to that host only, as Authorization: Bearer, '
        "over https and to the usual port; or by origin, as http://files.internal:8080.",
    )
    import_buckets: CommaSeparated = Field(
        (), description="Buckets that adapters may be fetched from, as s3://one,s3://two/prefix."
    )
    push_namespaces: CommaSeparated = Field(
        (), description="Owners of repositories of the hub that adapters may be sent to, as acme,me; * is any."
    )
    push_buckets: CommaSeparated = Field(
        (), description="Buckets that adapters may be written to as OCI layouts, as s3://registry/adapters."
    )
    import_allow_http: bool = Field(False, description="on: adapters may come from http:// URLs, beside https://.")
    import_allowed_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        (), description="Networks that are not public and that URLs of adapters may lead to, as 10.0.0.0/8."
    )
    import_timeout_seconds: float = Field(3600.0, gt=0, description="Longest time to fetch or send one adapter.")
    staging_max_age_hours: float = Field(24.0, gt=0, description="Uploads left by a killed server go after this time.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return tuple(json.loads(value))
        return tuple(part for part in value.split(os.pathsep) if part)

    @field_validator("webhook_allowed_networks", "import_allowed_networks", mode="before")
    @classmethod
    def _split_networks(cls, value: Any) -> Any:
        return _split_commas(value)

    @field_validator("import_buckets", "push_buckets")
    @classmethod
    def _check_buckets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if urlsplit(url).scheme != "s3" or not urlsplit(url).netloc:
                raise ValueError(f"{url!r} is not s3://bucket or s3://bucket/prefix")
        return value

    @field_validator("log_level", "log_format", "pool", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _derive_urls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        data_dir = _absolute(Path(values.get("data_dir") or "rankwise-data"))
        derived = dict(values)
        if not derived.get("database_url"):
            derived["database_url"] = f"sqlite:///{data_dir / 'rankwise.db'}"
        if not derived.get("blob_url"):
            derived["blob_url"] = (data_dir / "blobs").as_uri()
        return derived

    @model_validator(mode="after")
    def _refuse_an_open_door(self) -> Self:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"refusing to bind to {self.host}: anyone who reaches it could read, write and delete. "
                "Set RANKWISE_API_KEYS=on and create a key with `rankwise keys create`, or bind to 127.0.0.1."
            )
        if self.pool == "ray":
            self._refuse_what_nodes_do_not_reach()
        if self.beat_seconds * 2 > self.lease_seconds:
            raise ValueError("beat_seconds must be at most half of lease_seconds, or a healthy worker loses its job")
        return self

    def _refuse_what_nodes_do_not_reach(self) -> None:
        for name, value, local in (
            ("database_url", self.database_url, ("sqlite",)),
            ("blob_url", self.blob_url, ("file:", "memory:")),
        ):
            if value.startswith(local):
                raise ValueError(
                    f"with pool=ray the nodes of the cluster must reach the {name}, and {value.partition(':')[0]} "
                    "is of this machine alone. Set RANKWISE_DATABASE_URL to a PostgreSQL database and "
                    "RANKWISE_BLOB_URL to s3://, gs:// or az://."
                )

    @property
    def staging_root(self) -> Path:
        """Where uploads are staged when the blob store has no folder of its own."""
        return self.data_dir / "staging"

    @property
    def cache_dir(self) -> Path:
        """Content-addressed values that can be computed again."""
        return self.data_dir / "cache"
