"""Which other servers this one fetches adapters from and sends them to, by its settings."""

from __future__ import annotations

from app.egress_policies import import_policy
from app.settings import Settings
from workers.remotes import Remotes


def remotes_of(settings: Settings) -> Remotes:
    """With the secrets in them: for worker processes, and for checks when a job is submitted."""
    return Remotes(
        hub=settings.hub_endpoint,
        hub_tokens={name: token.get_secret_value() for name, token in settings.hub_tokens.items()},
        hosts=settings.import_hosts,
        host_tokens={host.lower(): token.get_secret_value() for host, token in settings.import_tokens.items()},
        buckets=settings.import_buckets,
        namespaces=settings.push_namespaces,
        push_buckets=settings.push_buckets,
        policy=import_policy(settings),
        max_bytes=settings.max_upload_bytes,
        timeout_seconds=settings.import_timeout_seconds,
    )
