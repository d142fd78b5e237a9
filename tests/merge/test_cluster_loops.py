"""Sums of components cluster by cluster, against products with the matrix that says who is in which."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.cluster_loops import column_sums, row_sums
from merge.panel import LANES


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    components=st.integers(1, 2 * LANES + 5),
    clusters=st.integers(1, 2 * LANES + 3),
    side=st.integers(1, 2 * LANES + 5),
    seed=st.integers(0, 99),
)
def test_sums_are_those_of_the_members(components: int, clusters: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, clusters, components)  # some clusters may be empty
    A, factors = rng.normal(size=(components, side)).astype(np.float32), rng.normal(size=components)
    means = np.zeros((clusters, components))
    means[labels, np.arange(components)] = factors
    members = labels.argsort(kind="stable")
    starts = np.searchsorted(labels[members], np.arange(clusters + 1))
    rows, columns = (np.full(shape, np.nan, np.float32) for shape in ((clusters, side), (side, clusters)))
    row_sums(A, members, starts, factors[members].astype(np.float32), rows)
    column_sums(np.ascontiguousarray(A.T), members, starts, factors[members].astype(np.float32), columns)
    np.testing.assert_allclose(rows, means @ A, atol=3e-5)
    np.testing.assert_array_equal(columns.T, rows)
