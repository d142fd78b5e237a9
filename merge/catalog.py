"""The table of merge methods: name → options, implementation, source and capabilities. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from artifacts.menu import find_row, parse_options
from artifacts.pointers import pointers_below
from merge import entrywise_options as entrywise
from merge import peer_options as peer
from merge.options import CatOptions, LegoOptions, LinearOptions, MergeOptions, SvdOptions
from merge.search_options import SearchOptions


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method can take.

    Attributes:
        negative_weights: weights below 0 are meaningful.
        lora_bias: biases of lora_B (PEFT `lora_bias`) are summed exactly; otherwise such adapters are refused.
        exact_sum: the result equals Σ wᵢ·ΔWᵢ whenever the output rank allows it.
        only_adapters: the one number of adapters that it merges; null for any.
    """

    negative_weights: bool
    lora_bias: bool
    exact_sum: bool
    only_adapters: int | None = None


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """One row of the menu. `implementation` is imported in a worker only."""

    name: str
    title: str
    summary: str
    options: type[MergeOptions]
    implementation: str
    arxiv: str | None
    reference_url: str
    capabilities: Capabilities

    @property
    def family(self) -> str:
        """What its file of the implementation, of the tests and of the reference is called."""
        return self.implementation.partition(":")[0].rpartition(".")[2]

    @property
    def page(self) -> str:
        """Its place in the reference: a page of its own, or a heading of its family's."""
        return f"{self.family}.md" + ("" if self.implementation.endswith(":merge") else f"#{self.name}")

    def load(self) -> Callable[..., Any]:
        """Import the implementation (torch)."""
        module, _, function = self.implementation.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


def _peer(
    implementation: str,
    title: str,
    summary: str,
    options: type[MergeOptions],
    source: str,
    *,
    negative_weights: bool = True,
    only_adapters: int | None = None,
) -> MergeMethod:
    """A row whose method is the last part of `family:function` (`merge` stands for the family's name).

    Args:
        source: an arXiv id or an address.
    """
    family, _, function = implementation.partition(":")
    arxiv = None if source.startswith("http") else source
    return MergeMethod(
        name=family if function == "merge" else function,
        title=title,
        summary=summary,
        options=options,
        implementation=f"merge.methods.{implementation}",
        arxiv=arxiv,
        reference_url=f"https://arxiv.org/abs/{arxiv}" if arxiv else source,
        capabilities=Capabilities(
            negative_weights=negative_weights, lora_bias=False, exact_sum=False, only_adapters=only_adapters
        ),
    )


_PEFT = "https://huggingface.co/docs/peft/developer_guides/model_merging"
_MERGEKIT = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"

_ROWS = (
    MergeMethod(
        name="lego",
        title="LoRA-LEGO",
        summary="Clusters the rank components of all adapters per module by k-means; each cluster's reweighted mean "
        "becomes one rank component of the merged adapter.",
        options=LegoOptions,
        implementation="merge.methods.lego:merge",
        arxiv="2409.16167",
        reference_url="https://arxiv.org/abs/2409.16167",
        capabilities=Capabilities(negative_weights=False, lora_bias=False, exact_sum=False),
    ),
    MergeMethod(
        name="cat",
        title="Concatenation",
        summary="Stacks the factors: the exact weighted sum, at rank Σ rᵢ.",
        options=CatOptions,
        implementation="merge.methods.cat:merge",
        arxiv=None,
        reference_url="https://huggingface.co/docs/peft/developer_guides/lora#merge-lora-weights-into-the-base-model",
        capabilities=Capabilities(negative_weights=True, lora_bias=True, exact_sum=True),
    ),
    MergeMethod(
        name="svd",
        title="Truncated SVD",
        summary="The best approximation of the weighted sum at a given rank, by an exact SVD of its small core.",
        options=SvdOptions,
        implementation="merge.methods.svd:merge",
        arxiv=None,
        reference_url="https://doi.org/10.1007/BF02288367",
        capabilities=Capabilities(negative_weights=True, lora_bias=False, exact_sum=True),
    ),
    MergeMethod(
        name="linear",
        title="Task arithmetic",
        summary="λ·Σ wᵢ·ΔWᵢ on the deltas themselves, re-expressed at its own (or a given) rank; no cross terms.",
        options=LinearOptions,
        implementation="merge.methods.linear:merge",
        arxiv="2212.04089",
        reference_url="https://arxiv.org/abs/2212.04089",
        capabilities=Capabilities(negative_weights=True, lora_bias=True, exact_sum=True),
    ),
    _peer(
        "core_space:core_space",
        "Core Space",
        "Every delta as a small matrix in bases that all adapters share, exactly; a rule (sum, TIES, DARE, TSV, Iso) "
        "merges those.",
        peer.CoreSpaceOptions,
        "2509.17786",
    ),
    _peer(
        "core_space:tsv_m",
        "TSV-Merge",
        "The singular vectors of all deltas, made orthogonal to each other, with their own singular values.",
        peer.TsvOptions,
        "2412.00081",
    ),
    _peer(
        "core_space:iso_c",
        "Iso-C",
        "The weighted sum with all its singular values set to their mean.",
        peer.IsoOptions,
        "2502.04959",
    ),
    _peer(
        "core_space:iso_cts",
        "Iso-CTS",
        "Leading directions of the sum beside directions of each adapter alone, all of one size.",
        peer.IsoCtsOptions,
        "2502.04959",
    ),
    _peer(
        "knots:merge",
        "KnOTS",
        "One SVD of all deltas side by side; a rule (TIES, DARE, sum) merges the adapters' parts of it.",
        peer.KnotsOptions,
        "2410.19735",
    ),
    _peer(
        "pico:merge",
        "Pico",
        "Scales down the output directions that the adapters share, merges, and restores the mean norm.",
        peer.PicoOptions,
        "2604.16826",
    ),
    _peer(
        "ctm:merge",
        "Compress then merge",
        "Projects every delta to shared subspaces of the output rank and merges there; the choice of the subspaces is "
        "not confirmed by the paper's abstract.",
        peer.CtmOptions,
        "2606.03723",
    ),
    _peer(
        "coefficients:slerp",
        "SLERP",
        "Spherical interpolation between the deltas of two adapters.",
        peer.SlerpOptions,
        _MERGEKIT,
        negative_weights=False,
        only_adapters=2,
    ),
    _peer(
        "coefficients:karcher",
        "Karcher mean",
        "The mean direction of the deltas on the sphere, at their mean norm.",
        peer.KarcherOptions,
        _MERGEKIT,
        negative_weights=False,
    ),
    _peer(
        "coefficients:model_stock",
        "Model Stock",
        "The mean of the deltas, shortened by how little they agree.",
        peer.ModelStockOptions,
        "2403.19522",
    ),
    _peer(
        "factorwise:linear_factor",
        "PEFT linear",
        "Adds the A's and the B's apart, as PEFT's `linear`: with cross terms, whose size the report gives.",
        peer.FactorwiseOptions,
        _PEFT,
    ),
    _peer(
        "factorwise:ties",
        "PEFT TIES",
        "Trims, elects signs and averages the entries of A and of B apart, as PEFT's `ties`.",
        peer.FactorwiseTiesOptions,
        "2306.01708",
    ),
    _peer(
        "factorwise:dare_linear",
        "PEFT DARE",
        "Drops entries of A and of B at random, rescales and adds them apart, as PEFT's `dare_linear`; seeded.",
        peer.FactorwiseDareOptions,
        "2311.03099",
    ),
    _peer(
        "factorwise:dare_ties",
        "PEFT DARE-TIES",
        "Drops entries of A and of B at random, then elects signs, as PEFT's `dare_ties`; seeded.",
        peer.FactorwiseDareTiesOptions,
        "2311.03099",
    ),
    _peer(
        "factorwise:magnitude_prune",
        "PEFT magnitude pruning",
        "Keeps the largest entries of A and of B and adds them apart, as PEFT's `magnitude_prune`.",
        peer.FactorwisePruneOptions,
        _PEFT,
    ),
    _peer(
        "robustmerge:robustmerge",
        "RobustMerge",
        "Prunes both factors by size, scales components by what they lost, and adds the factors, as the official code.",
        peer.RobustMergeOptions,
        "2502.17159",
    ),
    _peer(
        "robustmerge:robustmerge_product",
        "RobustMerge on products",
        "RobustMerge's pruning and scaling, with the products of the factors added: no cross terms.",
        peer.RobustMergeProductOptions,
        "2502.17159",
    ),
    _peer(
        "entrywise:ties_svd",
        "TIES",
        "On the deltas: trims, elects signs and averages entry by entry, as PEFT's `ties_svd`; then a truncated SVD.",
        entrywise.TiesSvdOptions,
        "2306.01708",
    ),
    _peer(
        "entrywise:ties_mergekit",
        "TIES of mergekit",
        "On the deltas: TIES as mergekit defines it, with the weights in the vote and in the divisor; then a truncated "
        "SVD.",
        entrywise.TiesMergekitOptions,
        "2306.01708",
    ),
    _peer(
        "entrywise:dare_linear_svd",
        "DARE",
        "On the deltas: drops entries at random, rescales and sums, as PEFT's `dare_linear_svd`; then a truncated SVD.",
        entrywise.DareSvdOptions,
        "2311.03099",
    ),
    _peer(
        "entrywise:dare_ties_svd",
        "DARE-TIES",
        "On the deltas: drops entries at random, then elects signs, as PEFT's `dare_ties_svd`; then a truncated SVD.",
        entrywise.DareTiesSvdOptions,
        "2311.03099",
    ),
    _peer(
        "entrywise:magnitude_prune_svd",
        "Magnitude pruning",
        "On the deltas: keeps the largest entries and sums, as PEFT's `magnitude_prune_svd`; then a truncated SVD.",
        entrywise.PruneSvdOptions,
        _PEFT,
    ),
    _peer(
        "entrywise:della",
        "DELLA",
        "On the deltas: drops entries at random, small ones of a row more often; then elects signs; a truncated SVD.",
        entrywise.DellaOptions,
        "2406.11617",
    ),
    _peer(
        "entrywise:della_linear",
        "DELLA without election",
        "On the deltas: drops entries at random, small ones of a row more often, and sums; then a truncated SVD.",
        entrywise.DellaLinearOptions,
        "2406.11617",
    ),
    _peer(
        "entrywise:breadcrumbs",
        "Model Breadcrumbs",
        "On the deltas: drops the largest and the smallest entries and sums; then a truncated SVD.",
        entrywise.BreadcrumbsOptions,
        "2312.06795",
    ),
    _peer(
        "entrywise:breadcrumbs_ties",
        "Breadcrumbs-TIES",
        "On the deltas: drops the largest and the smallest entries, then elects signs; then a truncated SVD.",
        entrywise.BreadcrumbsTiesOptions,
        "2312.06795",
    ),
    _peer(
        "entrywise:sce",
        "SCE",
        "On the deltas: positions where they vary most, weighted by energy, minority signs erased; a truncated SVD.",
        entrywise.SceOptions,
        "2408.07990",
    ),
)

METHODS: Mapping[str, MergeMethod] = {row.name: row for row in _ROWS}


@dataclass(frozen=True, slots=True)
class MergeSearch:
    """The row of the search, which merges by the methods of the others."""

    name: str
    title: str
    summary: str
    options: type[SearchOptions]
    arxiv: str | None
    reference_url: str
    capabilities: Capabilities


SEARCH = MergeSearch(
    name="search",
    title="Search",
    summary="Tries methods, weights and parameters, measures each merge on data, and keeps the best.",
    options=SearchOptions,
    arxiv="1907.10902",
    reference_url="https://arxiv.org/abs/1907.10902",
    capabilities=Capabilities(negative_weights=True, lora_bias=True, exact_sum=False),
)
MENU: Mapping[str, MergeMethod | MergeSearch] = {**METHODS, SEARCH.name: SEARCH}
"""What `POST /merge` takes."""


def find_method(name: str) -> MergeMethod:
    """The row of a method. Raises RequestInvalid, with the names that exist, when there is none."""
    return find_row(METHODS, "merge", name)


def parse_parameters(method: str, parameters: Mapping[str, Any]) -> MergeOptions:
    """Validate `parameters` against the options of `method`.

    Raises:
        RequestInvalid: unknown method or parameter, or a value out of range; each finding with its JSON pointer.
    """
    return parse_options(find_method(method).options, "merge", "merge", method, parameters)


def aliases(method: str) -> Mapping[str, str]:
    """Other names that parameters may be given under, each with the parameter's own."""
    fields = find_method(method).options.model_fields
    return {field.alias: name for name, field in fields.items() if field.alias is not None}


@contextmanager
def pointers_as_sent(method: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Errors from inside point to a parameter by the name that the client gave it."""
    with ExitStack() as stack:
        for alias, name in aliases(method).items():
            if alias in parameters:
                stack.enter_context(pointers_below(f"/parameters/{alias}", f"/parameters/{name}"))
        yield
