"""Opens the object store that a URL names: local files, S3, Google Cloud Storage, Azure, or memory (for tests)."""

from __future__ import annotations

import ipaddress
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from obstore import store as obstores
from obstore.exceptions import BaseError

from artifacts.errors import BlobStoreUnavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

URL_HINT = "Use file:///folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix."
# A large download may take hours: only a connection on which nothing moves is given up.
CLIENT: ClientConfig = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=60),
    "timeout": timedelta(hours=12),
}
RETRIES: RetryConfig = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
CLOUDS = ("s3", "gs", "az")


def open_store(url: str) -> tuple[ObjectStore, Path | None]:
    """The store, and its folder if it is local; the folder is made.

    Credentials of S3 come from AWS_ACCESS_KEY_ID … or AWS_PROFILE, its endpoint from AWS_ENDPOINT_URL; those of the
    others from the variables that their own tools use.

    Raises:
        BlobStoreUnavailable: an unknown kind of URL, a folder that can not be made, incomplete or unsafe settings.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        root = _local_root(url)
        return obstores.LocalStore(root), root
    if parts.scheme == "memory":
        return obstores.MemoryStore(), None
    if parts.scheme not in CLOUDS or not parts.netloc:
        raise BlobStoreUnavailable(f"{url!r} is not the URL of a blob store", hint=URL_HINT)
    try:
        if parts.scheme == "s3":
            return _open_s3(url), None
        return obstores.from_url(url, client_options=CLIENT, retry_config=RETRIES), None
    except (BaseError, ValueError) as error:
        raise BlobStoreUnavailable(f"the blob store {url!r} can not be used: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The message without the dump of Rust structures that follows it."""
    return str(error).split("\n", 1)[0].strip()


def _local_root(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/"):
        raise BlobStoreUnavailable(f"{url!r} does not name an absolute folder", hint="Use file:///folder.")
    root = Path(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BlobStoreUnavailable(f"the folder {root} can not be made: {error.strerror}") from error
    return root


def _open_s3(url: str) -> ObjectStore:
    options: dict[str, Any] = {}
    client = CLIENT.copy()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["endpoint"] = endpoint.rstrip("/")
        if urlsplit(endpoint).scheme == "http":
            _require_trusted_http(endpoint)
            client["allow_http"] = True
    if os.environ.get("AWS_PROFILE") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        options["credential_provider"] = _profile_credentials()
    return obstores.S3Store.from_url(url, client_options=client, retry_config=RETRIES, **options)


def _require_trusted_http(endpoint: str) -> None:
    """Credentials and weights go unencrypted over http, so only where nobody else listens, or where it is asked for."""
    host = urlsplit(endpoint).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        trusted = address.is_loopback or address.is_private
    except ValueError:
        # a name without a dot is resolved inside the host or its network: "localhost", a service of a compose file
        trusted = bool(host) and "." not in host
    if not trusted and os.environ.get("AWS_ALLOW_HTTP", "").lower() not in ("1", "true", "yes"):
        raise BlobStoreUnavailable(
            f"the S3 endpoint {endpoint} is not encrypted and not on a private address",
            hint="Use https, or set AWS_ALLOW_HTTP=true if the network is trusted.",
        )


def _profile_credentials() -> Any:
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise BlobStoreUnavailable(
            "AWS_PROFILE is set, but reading profiles needs boto3, which is not installed",
            hint="pip install 'rankwise[s3]', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ) from error
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    try:
        return Boto3CredentialProvider()
    except (BotoCoreError, ValueError) as error:
        raise BlobStoreUnavailable(
            f"the AWS profile {os.environ['AWS_PROFILE']!r} gives no credentials: {error}"
        ) from error
