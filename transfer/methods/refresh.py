"""Refresh (arXiv:2608.20918): the old specialist answers real inputs that were kept."""

from __future__ import annotations

from artifacts.errors import FieldError, TransferRefused
from transfer.bench import Bench
from transfer.candidates import Candidate, first_accepted, screen
from transfer.sources import Drawn, PromptSource


class Refresh(PromptSource):
    """The inputs are those that were given, each once."""

    def draw(self, bench: Bench) -> Drawn:
        given = bench.inputs.inputs
        screened = screen([Candidate(index, text, "stop") for index, text in enumerate(given)], ())
        kept = first_accepted(screened, set(range(len(given))), len(given))
        if not kept:
            raise TransferRefused(
                "No input was given that could be answered.",
                hint="Give the inputs that were kept, without their answers.",
                errors=[FieldError("/inputs", "are needed")],
            )
        return Drawn(tuple(kept), report={"inputs": len(given), "used": len(kept)})
