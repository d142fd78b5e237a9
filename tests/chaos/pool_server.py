"""A server process of its own: a supervisor with the settings that are given as JSON. It runs until it is killed."""

from __future__ import annotations

import json
import sys
import threading

from pool_harness import KINDS

from workers.kinds import KINDS as REAL_KINDS
from workers.supervisor import PoolSettings, Supervisor


def main() -> None:
    from pathlib import Path

    settings = json.loads(sys.argv[1])
    settings["data_dir"] = Path(settings["data_dir"])
    supervisor = Supervisor(PoolSettings(**settings, kinds={**REAL_KINDS, **KINDS}))
    supervisor.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
