"""Everything at once: the service in a process of its own, a Ray cluster, PostgreSQL and S3, all on loopback."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent / "workers"))

from pool_harness import _has_ended, _wait_until  # noqa: F401
from ray_harness import make_ray_cluster  # noqa: F401

STORAGE = Path(__file__).parent.parent / "storage" / "conftest.py"


def _storage_fixtures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("storage_fixtures", STORAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_storage = _storage_fixtures()
postgres_server = _storage.postgres_server
new_postgres = _storage.new_postgres
s3_endpoint = _storage.s3_endpoint
s3_bucket = _storage.s3_bucket
