"""Where this server's webhooks may go, by its settings."""

from __future__ import annotations

from app.settings import Settings
from workers.egress import EgressPolicy


def egress_policy(settings: Settings) -> EgressPolicy:
    """https to public addresses, and whatever the settings allow beside."""
    return EgressPolicy(settings.webhook_allow_http, settings.webhook_allowed_networks)
