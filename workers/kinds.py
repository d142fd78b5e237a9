"""The table of job kinds: name → what runs it, as "module:function". Only a worker process imports the function."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "merge": "workers.jobs.merge:run",
        "compose": "workers.jobs.compose:run",
        "compare": "workers.jobs.compare:run",
        "merge_compare": "workers.jobs.merge_compare:run",
        "convert": "workers.jobs.convert:run",
        "import": "workers.jobs.import_adapter:run",
        "push": "workers.jobs.push:run",
        "load_check": "workers.jobs.load_check:run",
        "quantize": "workers.jobs.quantize:run",
        "train": "workers.jobs.train:run",
        "client_update": "workers.jobs.client_update:run",
        "transfer": "workers.jobs.transfer:run",
    }
)
SINGLE_USE = frozenset({"train", "transfer", "client_update", "push"})
"""Kinds whose worker process serves no other attempt afterwards: only its end surely returns a device's memory, or ends
a thread that waits for another server."""
