"""An installation compiles every loop at once, so that no merge waits for it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from merge import cluster_loops, entry_loops, gram_loops, mask_loops, panel, product_loops, strip_loops

SCRIPT = """
from merge import cluster_loops, entry_loops, gram_loops, kmeans_loops, mask_loops
from merge import product_loops, rank_loops, strip_loops
from merge.compiling import compile_loops
compile_loops()
# what loops call of each other lies in the cache with those that call it
called = {"row_keys", "drawn_at"}
loops = {kmeans_loops.solve, kmeans_loops.adjusted_rand}
for module in (cluster_loops, entry_loops, gram_loops, mask_loops, product_loops, rank_loops, strip_loops):
    named = {name: loop for name, loop in vars(module).items() if hasattr(loop, "stats") and name[0] != "_"}
    loops |= {loop for name, loop in named.items() if name not in called}
missing = [loop.__name__ for loop in loops if not (loop.stats.cache_hits or loop.stats.cache_misses)]
print(len(loops), missing)
"""


@pytest.mark.slow
def test_every_loop_is_compiled_or_loaded() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split(
        " ", 1
    )
    assert int(found[0]) >= 17
    assert found[1].strip() == "[]"


@pytest.mark.parametrize(
    ("loops", "name", "source"),
    [
        (cluster_loops, "PANEL_DIGEST", panel),
        (entry_loops, "PANEL_DIGEST", panel),
        (gram_loops, "PANEL_DIGEST", panel),
        (product_loops, "PANEL_DIGEST", panel),
        (strip_loops, "PANEL_DIGEST", panel),
        (strip_loops, "MASK_DIGEST", mask_loops),
    ],
)
def test_a_change_of_what_a_loop_calls_is_one_of_the_loop(loops: ModuleType, name: str, source: ModuleType) -> None:
    """A compiled loop is kept until its own file changes; the panels in it are in another."""
    found = hashlib.sha256(Path(str(source.__file__)).read_bytes()).hexdigest()[:16]
    assert found == getattr(loops, name), f"put {found} in {loops.__name__}"
