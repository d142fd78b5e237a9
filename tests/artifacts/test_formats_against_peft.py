"""The deltas of every layout of the corpus that stock PEFT loads whole are PEFT's."""

from __future__ import annotations

import pytest

from scripts.formats_engines import PEFT_LOADS_NOT, against_peft, peft_candidates
from scripts.formats_figures import MAX_DIFFERENCE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_deltas_are_those_of_peft() -> None:
    known = peft_candidates()
    assert len(known) >= 35
    found = {name: against_peft(name, understood) for name, understood in known.items()}
    assert {name for name, compared in found.items() if compared is None} == PEFT_LOADS_NOT
    for name, compared in found.items():
        assert compared is None or compared.difference <= MAX_DIFFERENCE, name
