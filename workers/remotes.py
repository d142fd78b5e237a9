"""Which other servers adapters may be fetched from, and with which secrets: what the operator has allowed."""

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
        host_tokens: host → token that is sent to it and to no other (`Authorization: Bearer`).
        buckets: "s3://bucket" or "s3://bucket/prefix", with the endpoint and the credentials of the environment.
        policy: which addresses URLs may lead to. The hub's own address is the operator's word and is not judged.
        max_bytes: of one adapter.
        timeout_seconds: for all files of one adapter.
    """

    hub: str | None = None
    hub_tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    hosts: tuple[str, ...] = ()
    host_tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    buckets: tuple[str, ...] = ()
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
        """Raises RequestInvalid: that part of that bucket is not one of the allowed ones."""
        for allowed in map(urlsplit, self.buckets):
            prefix = allowed.path.strip("/")
            if allowed.netloc == bucket and (not prefix or f"{path}/".startswith(f"{prefix}/")):
                return
        listed = ", ".join(self.buckets) or "none"
        raise _refused(
            "/s3",
            f"s3://{bucket}/{path} is not used by this server; allowed: {listed}",
            "Whoever runs the service can set RANKWISE_IMPORT_BUCKETS.",
        )


def _fits(host: str, pattern: str) -> bool:
    return pattern in (ANY_HOST, host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _refused(pointer: str, problem: str, hint: str) -> RequestInvalid:
    return RequestInvalid(f"{problem[0].upper()}{problem[1:]}.", hint=hint, errors=[FieldError(pointer, problem)])
