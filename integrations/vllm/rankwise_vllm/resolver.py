"""The resolver: from a model name in a request to an adapter on disk, or to nothing and a line in the log."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from rankwise_vllm.cache import AdapterCache, CacheError
from rankwise_vllm.registry import Registry, RegistryError, StoredAdapter

_log = logging.getLogger(__name__)


class RankwiseResolver(LoRAResolver):
    """Looks a name up in a Rankwise service: an adapter's id, an alias, or the name of one adapter.

    Args:
        base_model: what adapters call the base model; as vLLM calls it, if it is "".
    """

    def __init__(self, registry: Registry, cache: AdapterCache, base_model: str = "") -> None:
        self._registry, self._cache, self._base_model = registry, cache, base_model

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request that loads the adapter; None where there is none that vLLM could load onto this base model."""
        try:
            path = await asyncio.to_thread(self._fetch, self._base_model or base_model_name, lora_name)
        except (RegistryError, CacheError, OSError) as error:
            _log.warning("the adapter %r can not be loaded from Rankwise: %s", lora_name, error)
            return None
        if path is None:
            return None
        # vLLM gives the request a number of its own; until then any positive one will do.
        number = int(path.name[:7], 16) + 1
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

    def _fetch(self, base_model: str, name: str) -> Path | None:
        adapter = self._registry.find(name)
        if adapter is None or not self._fits(adapter, base_model, name):
            return None
        return self._cache.fetch(self._registry, adapter)

    def _fits(self, adapter: StoredAdapter, base_model: str, name: str) -> bool:
        if adapter.base_model != base_model:
            _log.warning("the adapter %r is for the base model %r, not for %r", name, adapter.base_model, base_model)
            return False
        answer = self._registry.compatibility(adapter.id)
        for level, message in answer.findings:
            if level == "needs":
                _log.info("the adapter %r: %s", name, message)
            else:
                _log.warning("vLLM would not load the adapter %r: %s", name, message)
        return answer.loads
