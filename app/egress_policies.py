"""Where this server's webhooks and imports may go, by its settings."""

from __future__ import annotations

from app.settings import Settings
from workers.egress import EgressPolicy


def webhook_policy(settings: Settings) -> EgressPolicy:
    """https to public addresses, and whatever the settings allow beside."""
    return EgressPolicy(settings.webhook_allow_http, settings.webhook_allowed_networks)


def import_policy(settings: Settings) -> EgressPolicy:
    """The same for adapters that are fetched, with settings of their own."""
    return EgressPolicy(
        settings.import_allow_http,
        settings.import_allowed_networks,
        settings="RANKWISE_IMPORT",
        instead="Whoever runs the service can give a host's token in RANKWISE_IMPORT_TOKENS.",
    )
