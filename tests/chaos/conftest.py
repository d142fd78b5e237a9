"""The pool's fixtures. Worker processes import `pool_kinds` and `chaos_kinds` by the paths that are set here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "workers"))
sys.path.insert(0, str(Path(__file__).parent))

from pool_harness import (  # noqa: F401
    _exists,
    _has_ended,
    _wait_until,
    add_adapter,
    database,
    empty_database,
    pool,
    provider,
    torch_provider,
    write_adapter,
)
