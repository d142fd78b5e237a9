"""A Ray cluster on loopback, in a process of its own: `python ray_nodes.py '{"nodes": [{"num_cpus": 1}]}'`.

A process, so that Ray changes nothing in the one that runs the tests, and so that the cluster ends with it. It reads
commands from its standard input, one JSON value a line, and answers each with one: {"lose": n} kills the raylet of
node n, {"add": {…}} adds a node, {"stop": true}, or the end of the input, ends all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"

import psutil
from ray.cluster_utils import Cluster

# Not 127.0.0.1: drivers replace that by an address of the network.
ADDRESS = "127.0.0.2"
STORE_BYTES = 80 * 1024**2
DEADLINE_SECONDS = 60.0


class Nodes:
    """The nodes of one cluster, by number; number 0 is the head."""

    def __init__(self, wanted: list[dict[str, Any]]) -> None:
        first, *others = wanted
        self.cluster = Cluster(initialize_head=True, head_node_args=_arguments(first, no_monitor=True))
        self.nodes = [self.cluster.head_node]
        for arguments in others:
            self.add(arguments)

    def add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.nodes.append(self.cluster.add_node(**_arguments(arguments)))
        return self.describe()

    def describe(self) -> dict[str, Any]:
        ids = [node.node_id for node in self.nodes]
        return {"address": self.cluster.address, "nodes": ids}

    def lose(self, number: int) -> dict[str, Any]:
        """Kill a node's raylet and nothing else: what it had started must end by itself."""
        node = self.nodes[number]
        processes = [info.process for infos in node.all_processes.values() for info in infos]
        family = [child for p in processes for child in psutil.Process(p.pid).children(recursive=True)]
        node.kill_raylet(check_alive=False)
        _, left = psutil.wait_procs(family, timeout=DEADLINE_SECONDS)
        self.cluster.remove_node(node, allow_graceful=False)
        return {"left": [" ".join(process.cmdline()) for process in left]}

    def stop(self) -> dict[str, Any]:
        session = self.nodes[0].get_session_dir_path()
        self.cluster.shutdown()
        psutil.wait_procs(_processes_of(session), timeout=DEADLINE_SECONDS)
        left = [str(process) for process in _processes_of(session)]
        shutil.rmtree(session, ignore_errors=True)
        return {"left": left}


def _arguments(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "node_ip_address": ADDRESS,
        "include_dashboard": False,
        "include_log_monitor": False,
        "object_store_memory": STORE_BYTES,
        **more,
        **given,
    }


def _processes_of(session: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if session in command and process.pid != os.getpid():
            found.append(process)
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is not an answer
    nodes = Nodes(json.loads(sys.argv[1])["nodes"])
    print(json.dumps(nodes.describe()), file=answers)
    for line in sys.stdin:
        match json.loads(line):
            case {"lose": number}:
                answer = nodes.lose(number)
            case {"add": arguments}:
                answer = nodes.add(arguments)
            case _:
                break
        print(json.dumps(answer), file=answers)
    print(json.dumps(nodes.stop()), file=answers)


if __name__ == "__main__":
    main()
