"""Results of passes over files, remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

_KEPT_MEASURES = 1024

T = TypeVar("T")


class Measures:
    """What writing an adapter in a certain way loses, and checksums of what was computed here: each costs a pass."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], measure: Callable[[], T]) -> T:
        """The value under `key`, measured if it is not known."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                found: T = self._known[key]
                return found
        value = measure()
        with self._lock:
            self._known[key] = value
            while len(self._known) > _KEPT_MEASURES:
                self._known.popitem(last=False)
        return value
