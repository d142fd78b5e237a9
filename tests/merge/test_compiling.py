"""An installation compiles every loop at once, so that no merge waits for it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from merge import entry_loops, gram_loops, panel

SCRIPT = """
from merge import entry_loops, gram_loops, kmeans_loops
from merge.compiling import compile_loops
compile_loops()
# what loops call of each other lies in the cache with those that call it
names = [name for name in vars(entry_loops) if hasattr(getattr(entry_loops, name), "stats") and name[0] != "_"]
loops = [getattr(entry_loops, name) for name in names] + [kmeans_loops.solve, kmeans_loops.adjusted_rand]
missing = [loop.__name__ for loop in loops if not (loop.stats.cache_hits or loop.stats.cache_misses)]
print(len(loops), missing)
"""


@pytest.mark.slow
def test_every_loop_is_compiled_or_loaded() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split(
        " ", 1
    )
    assert int(found[0]) >= 14
    assert found[1].strip() == "[]"


def test_a_change_of_the_panels_is_one_of_the_loops() -> None:
    """A compiled loop is kept until its own file changes; the panels in it are in another."""
    found = hashlib.sha256(Path(panel.__file__).read_bytes()).hexdigest()[:16]
    for loops in (entry_loops, gram_loops):
        assert found == loops.PANEL_DIGEST, f"put {found} in {loops.__file__}"
