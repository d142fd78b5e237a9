"""The pool of workers: how soon a job begins, how many go through, and what growth costs.

    python -m benchmarks.pool                        all sections, sizes that take about half an hour
    python -m benchmarks.pool latency throughput     some of them
    python -m benchmarks.pool cluster --full         a thousand slots and a hundred thousand jobs: an hour

Sections:
    latency     from submitting a job to its first line in a warm worker; with Ray side by side where it is installed
    throughput  a thousand jobs that do nothing over HTTP and through one local slot, on SQLite and on PostgreSQL
    claims      four supervisors on one PostgreSQL: no job may run twice
    growth      a claim, and every list, with a million adapters and jobs
    cluster     a thousand slots that do not exist, under the real supervisors: how busy they are, and what is first
                at its limit
    memory      what an idle service keeps in memory

Each section prints its figures with their goals and writes benchmarks/results/pool_<section>.json. Other work on the
machine makes every figure worse.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pool_cluster import Cluster, cluster, saturation
from benchmarks.pool_figures import RESULTS, Figure, show, write
from benchmarks.pool_growth import growth
from benchmarks.pool_memory import idle_memory
from benchmarks.pool_rows import Sizes
from benchmarks.pool_service import quiet_logs
from benchmarks.pool_throughput import double_claims, latency, throughput

DATABASES = ("sqlite", "postgresql")
FULL_CLUSTER_JOBS = 100_000
SHORT_JOB_SECONDS = 0.01


def run_latency(arguments: argparse.Namespace) -> list[Figure]:
    pools = ["local"] + (["ray"] if importlib.util.find_spec("ray") is not None and not arguments.without_ray else [])
    return [figure for pool in pools for figure in latency(pool, arguments.repeats)]


def run_throughput(arguments: argparse.Namespace) -> list[Figure]:
    return [figure for kind in arguments.databases for figure in throughput(kind, arguments.jobs)]


def run_claims(arguments: argparse.Namespace) -> list[Figure]:
    return double_claims(arguments.claims)


def run_growth(arguments: argparse.Namespace) -> list[Figure]:
    sizes = Sizes(arguments.rows, arguments.rows, arguments.rows // 10)
    return [figure for kind in arguments.databases for figure in growth(kind, sizes, arguments.rounds)]


def run_cluster(arguments: argparse.Namespace) -> list[Figure]:
    jobs = FULL_CLUSTER_JOBS if arguments.full else arguments.cluster_jobs
    size = Cluster(arguments.slots, jobs, arguments.job_seconds, arguments.supervisors)
    short = Cluster(arguments.slots, min(jobs, 3 * arguments.slots), SHORT_JOB_SECONDS, arguments.supervisors)
    return cluster(size) + saturation(short)


def run_memory(_arguments: argparse.Namespace) -> list[Figure]:
    return idle_memory()


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "latency": run_latency,
    "throughput": run_throughput,
    "claims": run_claims,
    "growth": run_growth,
    "cluster": run_cluster,
    "memory": run_memory,
}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--repeats", type=int, default=50, help="latency: jobs that are timed")
    parser.add_argument("--without-ray", action="store_true", help="latency: leave Ray out")
    parser.add_argument("--jobs", type=int, default=1000, help="throughput: jobs")
    parser.add_argument("--claims", type=int, default=3000, help="claims: jobs")
    parser.add_argument("--rows", type=int, default=1_000_000, help="growth: adapters, and finished jobs")
    parser.add_argument("--rounds", type=int, default=20, help="growth: calls of each list")
    parser.add_argument("--slots", type=int, default=1000, help="cluster: slots")
    parser.add_argument("--cluster-jobs", type=int, default=5000, help="cluster: jobs")
    parser.add_argument("--job-seconds", type=float, default=20.0, help="cluster: mean time of a job")
    parser.add_argument("--supervisors", type=int, default=4, help="cluster: supervisors that share the slots")
    parser.add_argument("--full", action="store_true", help=f"cluster: {FULL_CLUSTER_JOBS} jobs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON files")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.sections) - SECTIONS.keys())
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 when every goal was reached, else 1."""
    arguments = parse(words)
    quiet_logs()
    missed = 0
    for section in arguments.sections or SECTIONS:
        figures = SECTIONS[section](arguments)
        show(section, figures)
        options = {name: value for name, value in vars(arguments).items() if name not in ("sections", "results")}
        write(section, figures, options, arguments.results)
        missed += sum(figure.passed is False for figure in figures)
    print(f"\n{missed} goals were missed" if missed else "\nevery goal was reached")
    return 1 if missed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its servers and folders go with it
    raise SystemExit(main())
