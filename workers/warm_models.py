"""The base models and pipelines that a worker process keeps in memory: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Key = tuple[str, str, str]  # (model id, dtype, device)
Model = TypeVar("Model")

log = structlog.get_logger(__name__)


class WarmModels:
    """A cache of loaded models, bounded by the bytes of their parameters and buffers."""

    def __init__(self) -> None:
        self._models: OrderedDict[Key, tuple[Any, int]] = OrderedDict()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the models that are here, the most recently used first."""
        return tuple(dict.fromkeys(model_id for model_id, _, _ in reversed(self._models)))

    @property
    def bytes(self) -> int:
        """What they take together."""
        return sum(size for _, size in self._models.values())

    def get(
        self,
        key: Key,
        limit: int,
        estimate: int,
        load: Callable[[], Model],
        bytes_of: Callable[[Any], int] | None = None,
    ) -> Model:
        """The model under `key`, loaded if it is not here.

        Room is made before loading, since the device may not hold both. A model larger than `limit` is loaded, and
        not kept.

        Args:
            limit: bytes that all kept models may take.
            estimate: bytes that this one will take.
            bytes_of: what it takes once it is loaded; unset, it is one module (`model_bytes`).
        """
        if key in self._models:
            self._models.move_to_end(key)
            found: Model = self._models[key][0]
            return found
        self._make_room(limit - estimate)
        model = load()
        size = (bytes_of or model_bytes)(model)
        self._make_room(limit - size)
        if size <= limit:
            self._models[key] = (model, size)
        log.info("base_model_loaded", model=key[0], dtype=key[1], device=key[2], bytes=size, kept=size <= limit)
        return model

    def _make_room(self, limit: int) -> None:
        while self._models and self.bytes > limit:
            (model_id, _, device), (_, size) = self._models.popitem(last=False)
            log.info("base_model_dropped", model=model_id, device=device, bytes=size)


def model_bytes(model: PreTrainedModel) -> int:
    """What its parameters and buffers take; a tensor that two modules share counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
