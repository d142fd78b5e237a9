"""Rule 8, the other way round: a job that takes its whole server with it, again and again, does so a bounded number of
times, and the others go on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storage.claims import MAX_RESTARTS

SERVER = Path(__file__).parent / "pool_server.py"


@pytest.mark.slow
def test_a_job_that_kills_its_server_ends_as_failed(pool: Any, wait_until: Any) -> None:
    settings = dataclasses.asdict(pool.settings(lease_seconds=3600.0))
    del settings["kinds"]
    command = [sys.executable, SERVER, json.dumps(settings, default=str), "light"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    job_id = pool.submit("kill_server")
    server = None
    try:
        for _ in range(MAX_RESTARTS + 1):
            with subprocess.Popen(command, env=environment) as server:
                assert server.wait(60) == -9  # and not because of us
        assert pool.job(job_id).state == "running"  # nobody is there to write anything else
        server = subprocess.Popen(command, env=environment)
        job = pool.ended(job_id)
        assert (job.state, job.error["code"], job.failures) == ("failed", "server_killed", 0)
        assert job.restarts == job.attempt == MAX_RESTARTS + 1
        assert pool.ended(pool.submit("succeed")).state == "succeeded"
        assert server.poll() is None
    finally:
        if server is not None:
            server.kill()
            server.wait()
