"""A server process of its own: a supervisor with the settings that are given as JSON. It runs until it is killed.

With "light" as second argument its workers load no torch, and are there at once.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from pool_harness import KINDS
from rule_kinds import KINDS as RULE_KINDS

from workers.devices import parse_devices
from workers.kinds import KINDS as REAL_KINDS
from workers.local import LocalProvider
from workers.supervisor import PoolSettings, Supervisor


def main() -> None:
    given = json.loads(sys.argv[1])
    given["data_dir"] = Path(given["data_dir"])
    settings = PoolSettings(**given, kinds={**REAL_KINDS, **KINDS, **RULE_KINDS})
    light = sys.argv[2:] == ["light"]
    provider = LocalProvider(parse_devices(settings.devices), preload=("workers.runtime",)) if light else None
    Supervisor(settings, provider).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
