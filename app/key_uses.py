"""When API keys were used, without a write for every request."""

from __future__ import annotations

import time

from storage import keys


class KeyUses:
    """When this process last noted the use of each key: a write for every request would be one too many."""

    def __init__(self) -> None:
        self._noted: dict[str, float] = {}

    def is_due(self, key_id: str) -> bool:
        """Whether the use of the key should be written now; says so once a minute for each key."""
        now = time.monotonic()
        if now - self._noted.get(key_id, float("-inf")) < keys.TOUCH_INTERVAL.total_seconds():
            return False
        self._noted[key_id] = now
        return True
