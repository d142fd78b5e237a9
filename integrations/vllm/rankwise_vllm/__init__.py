"""A LoRA resolver for vLLM: a model name that vLLM does not know is looked up in a Rankwise service."""

from __future__ import annotations

import logging
import os

from rankwise_vllm.cache import AdapterCache
from rankwise_vllm.registry import Registry
from rankwise_vllm.settings import Settings

__all__ = ["NAME", "register"]

NAME = "Rankwise"
_log = logging.getLogger(__name__)


def register() -> None:
    """The entry point in the group vllm.general_plugins, which every process of vLLM calls, more than once at times.

    Raises:
        ValueError: RANKWISE_SERVER is no http address.
    """
    settings = Settings.of(os.environ)
    if settings is None:
        _log.info("RANKWISE_SERVER is not set: no adapters are loaded from Rankwise")
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from rankwise_vllm.resolver import RankwiseResolver

    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    registry = Registry(settings.server, settings.api_key)
    LoRAResolverRegistry.register_resolver(
        NAME, RankwiseResolver(registry, AdapterCache(settings.cache), settings.base_model)
    )
