"""Seeds only: the control of Trans-LoRA (arXiv:2405.17258, table 5)."""

from __future__ import annotations

from transfer.bench import Bench, required_seeds
from transfer.candidates import Screened
from transfer.sources import Drawn, PromptSource


class SeedsOnly(PromptSource):
    """The seeds are the inputs."""

    def draw(self, bench: Bench) -> Drawn:
        seeds = required_seeds(bench.inputs)
        kept = tuple(Screened(index, seed, "passed") for index, seed in enumerate(seeds))
        return Drawn(kept, report={"inputs": len(kept)})
