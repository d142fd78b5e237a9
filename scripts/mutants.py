"""Mutation testing of merge/: how many small changes of its code do its tests notice?

    make mutants                                    all of them: hours on two cores
    make mutants ARGS="merge.norms*"                those of some modules
    make mutants ARGS="--sample 400 --seed 1"       drawn at random over all of merge/

mutmut keeps what it found in mutants/, so that a run goes on where the last one ended, and runs again what changed.
`mutmut show NAME` prints a mutant that survived. Those that ran out of time are run once more, and told apart.
Functions under a decorator, which the compiled loops are, have no mutants.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

MUTANTS = Path("mutants")
SURVIVED = (0, 5, 33)
"""Exit codes that mutmut keeps of mutants that no test noticed, or that have no test (pytest's 5 and its own 33)."""
NOT_RUN = (None, 2, 34)
"""Of those that were not tried to the end: not yet, interrupted, skipped. All other codes are of tests that failed, ran
too long or crashed."""
TIMED_OUT = (-24, 24, 36, 152, 255)
"""Of mutants that ran too long, which count as killed."""
NOTHING = "no.such.mutant"


def outcomes() -> dict[str, int | None]:
    """mutant → what its tests ended with; None: not run yet."""
    found: dict[str, int | None] = {}
    for path in sorted(MUTANTS.glob("merge/**/*.meta")):
        if "__mutmut_" in path.with_suffix("").read_text():  # else it was mutated by an earlier configuration
            found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def interval(killed: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share killed."""
    z, share = 1.96, killed / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return middle - half, middle + half


def module_of(name: str) -> str:
    """The module of a mutant: merge.methods.lego.x_merge__mutmut_3 → merge.methods.lego."""
    return name.rsplit(".", 1)[0]


def table(names: Iterable[str], found: dict[str, int | None]) -> str:
    """Killed of those run, by module and in all."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name in names:
        if (code := found.get(name)) not in NOT_RUN:
            for row in (rows[module_of(name)], rows["merge, all"]):
                row[0] += code not in SURVIVED
                row[1] += code in TIMED_OUT
                row[2] += 1
    lines = [f"{'module':36} killed (by time)    run   share"]
    for module, (killed, late, count) in sorted(rows.items(), key=lambda item: (item[0] == "merge, all", item[0])):
        lines.append(f"{module:36} {killed:6} {late:9} {count:6} {killed / count:7.1%}")
    killed, _, count = rows["merge, all"]
    low, high = interval(killed, count) if count else (0.0, 1.0)
    return "\n".join([*lines, f"95 % interval of all: {low:.1%} to {high:.1%}"])


def mutmut(*arguments: str) -> int:
    command = [str(Path(sys.executable).with_name("mutmut")), "run", *arguments]
    return subprocess.run(command, check=False).returncode  # noqa: S603 (its arguments are names of mutants)


def main(arguments: list[str] | None = None) -> int:
    """0 when every mutant that was asked for has run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="mutants to run, with * for any text; all without it")
    parser.add_argument("--sample", type=int, help="run so many, drawn at random over all of merge/")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--children", type=int, default=2, help="mutants at a time")
    given = parser.parse_args(arguments)
    names = given.patterns
    if given.sample is not None:
        mutmut(NOTHING)  # makes the mutants; it ends with an error, for there is none of that name
        everything = sorted(outcomes())
        names = random.Random(given.seed).sample(everything, min(given.sample, len(everything)))  # noqa: S311
    code = mutmut("--max-children", str(given.children), *names)
    found = outcomes()
    late = [name for name in (names if given.sample is not None else found) if found.get(name) in TIMED_OUT]
    if late:
        code = mutmut("--max-children", str(given.children), *late) or code
        found = outcomes()
    sys.stdout.write(table(names if given.sample is not None else found, found) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
