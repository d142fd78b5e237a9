"""Which servers adapters may be fetched from and sent to, and with which secrets: what the operator allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from artifacts.errors import FieldError, RequestInvalid
from workers.egress import EgressPolicy

HUB = "https://huggingface.co"
DEFAULT_TOKEN = "default"  # noqa: S105
ANY_HOST = "*"


@dataclass(frozen=True, slots=True)
class Remotes:
    """Nothing is allowed unless it is said here. Secrets are never shown, and no job's parameters hold one.

    Attributes:
        hub: address of a hub that speaks the protocol of huggingface.co; None: no hub.
        hub_tokens: name → token of that hub; the one called "default" is used by whoever names none.
        hosts: of URLs: "civitai.com", "*.example.org" for all below it, "*" for any.
        host_tokens: host → token that is sent to it and to no other (`Authorization: Bearer`), over https and to the
            usual port; or origin ("http://files.internal:8080") → token.
        buckets: "s3://bucket" or "s3://bucket/prefix", with the endpoint and the credentials of the environment.
        namespaces: owners of repositories of the hub that adapters may be sent to; "*" for any.
        push_buckets: as `buckets`, for what adapters may be written to.
        policy: which addresses URLs may lead to. The hub's own address is the operator's word and is not judged.
        max_bytes: of one adapter.
        timeout_seconds: for all files of one adapter.
    """

    hub: str | None = None
    hub_tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    hosts: tuple[str, ...] = ()
    host_tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    buckets: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    push_buckets: tuple[str, ...] = ()
    policy: EgressPolicy = field(default_factory=EgressPolicy)
    max_bytes: int = 8 * 1024**3
    timeout_seconds: float = 3600.0

    def check_hub(self) -> str:
        """The hub's address. Raises RequestInvalid: there is none."""
        if self.hub is None:
            raise _refused("/hub", "this server uses no hub", "Whoever runs the service can set RANKWISE_HUB_ENDPOINT.")
        return self.hub

    def hub_token(self, name: str | None) -> str | None:
        """The token of that name; without a name the default one, if there is one. Raises RequestInvalid."""
        if name is None:
            return self.hub_tokens.get(DEFAULT_TOKEN)
        if name not in self.hub_tokens:
            known = ", ".join(sorted(self.hub_tokens)) or "none"
            raise _refused(
                "/hub/token",
                f"there is no token {name!r}; there are: {known}",
                "Give the name of a token, not the token: whoever runs the service can set RANKWISE_HUB_TOKENS.",
            )
        return self.hub_tokens[name]

    def check_url(self, url: str) -> None:
        """Raises RequestInvalid: its host is not one that files may be fetched from, or the policy refuses it."""
        try:
            host = self.policy.check_url(url).host.lower().rstrip(".")
        except RequestInvalid as error:
            findings = [FieldError("/url", item.message) for item in error.errors]
            raise RequestInvalid(error.detail, hint=error.hint, errors=findings) from error
        if not any(_fits(host, pattern.lower()) for pattern in self.hosts):
            allowed = ", ".join(self.hosts) or "none"
            raise _refused(
                "/url",
                f"files are not fetched from {host[:100]}; allowed hosts: {allowed}",
                "Whoever runs the service can set RANKWISE_IMPORT_HOSTS, with hosts that are redirected to.",
            )

    def check_bucket(self, bucket: str, path: str) -> None:
        """Raises RequestInvalid: nothing is fetched from that part of that bucket."""
        _check_bucket(self.buckets, bucket, path, "RANKWISE_IMPORT_BUCKETS")

    def check_push_bucket(self, bucket: str, path: str) -> None:
        """Raises RequestInvalid: nothing is written to that part of that bucket."""
        _check_bucket(self.push_buckets, bucket, path, "RANKWISE_PUSH_BUCKETS")

    def check_push_repo(self, repo: str, token: str | None) -> tuple[str, str]:
        """The hub's address and the token. Raises RequestInvalid: nothing is sent to that repository."""
        hub, owner = self.check_hub(), repo.rpartition("/")[0]
        if not owner or not any(name in (ANY_HOST, owner) for name in self.namespaces):
            listed = ", ".join(self.namespaces) or "none"
            raise _refused(
                "/hub/repo",
                f"adapters are not sent to {repo}; allowed owners of repositories: {listed}",
                "Whoever runs the service can set RANKWISE_PUSH_NAMESPACES.",
            )
        found = self.hub_token(token)
        if found is None:
            raise _refused(
                "/hub/token",
                "there is no token called default, and no other is named",
                "Whoever runs the service can set RANKWISE_HUB_TOKENS.",
            )
        return hub, found


def _check_bucket(allowed: tuple[str, ...], bucket: str, path: str, setting: str) -> None:
    for item in map(urlsplit, allowed):
        prefix = item.path.strip("/")
        if item.netloc == bucket and (not prefix or f"{path}/".startswith(f"{prefix}/")):
            return
    listed = ", ".join(allowed) or "none"
    raise _refused(
        "/s3",
        f"s3://{bucket}/{path} is not used by this server; allowed: {listed}",
        f"Whoever runs the service can set {setting}.",
    )


def _fits(host: str, pattern: str) -> bool:
    return pattern in (ANY_HOST, host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _refused(pointer: str, problem: str, hint: str) -> RequestInvalid:
    return RequestInvalid(f"{problem[0].upper()}{problem[1:]}.", hint=hint, errors=[FieldError(pointer, problem)])
