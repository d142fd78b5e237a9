"""The pool's fixtures. Worker processes import `pool_kinds` by the path that is set here."""

from __future__ import annotations

import sys
from pathlib import Path

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
from ray_harness import (  # noqa: F401
    make_ray_cluster,
    make_ray_provider,
    ray_cluster,
    ray_provider,
    ray_work_dir,
)
from webhook_receivers import receivers  # noqa: F401
