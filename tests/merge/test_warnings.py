"""What the figures of a merge say against trusting its result: when, about which modules, and how many of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from merge.report import ModuleReport
from merge.result import ClusterReport
from merge.warnings import merge_warnings


def module(path: str, clusters: ClusterReport | None = None, **changes: Any) -> ModuleReport:
    given = {
        "rank": 1,
        "padded": 0,
        "owners": (0,),
        "energy": 1.0,
        "result_energy": 1.0,
        "error": 0.0,
        "products": ((1.0,),),
    }
    return ModuleReport(path=path, clusters=clusters, **{**given, **changes})


def clusters(mean_cosine: float | None = 0.5, capped: int = 0) -> ClusterReport:
    return ClusterReport(
        inertia=0.0, sizes=(1,), mean_cosine=mean_cosine, agreement=1.0, largest_factor=1.0, capped=capped
    )


CASES: dict[str, tuple[ModuleReport, ModuleReport, str]] = {
    "clusters_not_identifiable": (
        module("a", clusters(0.149)),
        module("a", clusters(0.15)),
        "clusters_not_identifiable: in {n} of {all} modules ",
    ),
    "reweighting_capped": (
        module("a", clusters(capped=1)),
        module("a", clusters(capped=0)),
        "reweighting_capped: in {n} modules ",
    ),
    "cross_terms": (
        module("a", figures={"cross_term_error": 0.11}),
        module("a", figures={"cross_term_error": 0.1}),
        "cross_terms: in {n} of {all} modules ",
    ),
    "zero_delta": (
        module("a", energy=0.0),
        module("a", energy=1e-9),
        "zero_delta: the exact weighted sum is zero in {n} modules: ",
    ),
}


@pytest.mark.parametrize("count", [1, 5, 6, 8])
@pytest.mark.parametrize("name", CASES)
def test_only_the_modules_that_it_is_about_are_counted_and_a_few_named(name: str, count: int) -> None:
    found, fine, told = CASES[name]

    modules = [replace(found, path=f"m{at}") for at in range(count)] + [fine, module("plain")]
    paths = ", ".join(f"m{at}" for at in range(min(count, 5))) + (f" and {count - 5} more" if count > 5 else "")
    (line,) = merge_warnings(modules)
    assert line.startswith(told.format(n=count, all=count + 2))
    assert f": {paths}." in line


def test_what_gives_no_reason_to_doubt() -> None:
    assert merge_warnings([found for _, found, _ in CASES.values()]) == []
    # a cluster of single members has no cosine
    assert merge_warnings([module("a", clusters(mean_cosine=None))]) == []


def test_each_kind_is_told_once_in_one_order() -> None:
    found = merge_warnings([found for found, _, _ in CASES.values()][::-1])
    assert [line.partition(":")[0] for line in found] == list(CASES)
