"""Downloads of every layout of the corpus in every format are read again with the same ΔW."""

from __future__ import annotations

from collections import Counter

import pytest

from scripts.formats_figures import MAX_LOSS, kept_figures
from scripts.formats_round_trips import all_round_trips


@pytest.mark.slow
def test_nothing_is_lost_on_the_way_out_and_in_again() -> None:
    trips = all_round_trips()
    for trip in trips:
        assert trip.modules >= 1
        assert trip.difference <= (MAX_LOSS if trip.dtype == "float32" else 2**-7), trip
    counted = Counter(trip.layout for trip in trips if trip.dtype == "float32")
    kept = kept_figures()["round_trips"]
    assert counted == {name: found["layouts"] for name, found in kept.items()}
