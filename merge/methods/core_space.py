"""Core Space (arXiv:2509.17786): any rule on the core matrices Mᵢ = Uᵀ·ΔWᵢ·V; ΔW = U·M·Vᵀ.

TSV-Merge, Iso-C and Iso-CTS, which were made for whole weight matrices, are this with one rule each: on adapters they
have a meaning in the core only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from artifacts.algebra import Spectrum, small_svd
from merge import rules, spectral
from merge.core import CoreFrame
from merge.peer_options import CoreRuleOptions, CoreSpaceOptions, IsoCtsOptions, IsoOptions, TsvOptions
from merge.result import MergedModule
from merge.stack import Stack


def core_space(stack: Stack, options: CoreSpaceOptions, rank: int) -> MergedModule:
    """Merge the core matrices by `options.rule`."""
    frame = rule_frame(stack, options)
    return frame.merged(spectral.scaled(merged_core(frame, frame.cores(), options), options.scale), rank)


def tsv_m(stack: Stack, options: TsvOptions, rank: int) -> MergedModule:
    """TSV-Merge (arXiv:2412.00081) in the core: all singular triplets, their vectors made orthogonal together."""
    frame = CoreFrame.of(stack, "none")
    core = spectral.separated(frame.cores(), stack.ranks, stack.owner_weights, frame.cutoff, rank)
    return frame.merged(spectral.scaled(core, options.scale), rank)


def iso_c(stack: Stack, options: IsoOptions, rank: int) -> MergedModule:
    """Iso-C (arXiv:2502.04959) in the core: the weighted sum with all its singular values set to their mean."""
    frame = CoreFrame.of(stack, "none")
    return frame.merged(spectral.scaled(spectral.isotropic(frame.weighted_sum(), frame.cutoff), options.scale), rank)


def iso_cts(stack: Stack, options: IsoCtsOptions, rank: int) -> MergedModule:
    """Iso-CTS (arXiv:2502.04959) in the core: common directions of the sum and specific ones of each adapter."""
    frame = CoreFrame.of(stack, "none")
    cores = frame.cores() * stack.owner_weights[:, None, None]
    merged = spectral.isotropic_with_specifics(cores, stack.ranks, options.common_fraction, frame.cutoff)
    return frame.merged(spectral.scaled(merged, options.scale), rank)


def rule_frame(stack: Stack, options: CoreRuleOptions) -> CoreFrame:
    """The frame that `options.rule` needs: entries of a core mean nothing but in the singular bases."""
    return CoreFrame.of(stack, "both" if options.rule in ("ties", "dare") else "none")


def merged_core(frame: CoreFrame, cores: Tensor, options: CoreRuleOptions) -> Spectrum:
    """One core matrix (p, q) of those of the owners (N, p, q), by `options.rule`, as its SVD."""
    stack = frame.stack
    weights = stack.owner_weights
    if options.rule == "ties":
        kept = torch.stack([rules.trimmed(core, options.density) for core in cores])
        return small_svd(rules.elected_sum(kept, weights, options.majority_sign_method))
    if options.rule == "dare":
        seeds = rules.seeds(stack, options.seed)
        kept = torch.stack(
            [rules.dropped(core, options.density, seed) for core, seed in zip(cores, seeds, strict=True)]
        )
        return small_svd(rules.weighted_sum(kept, weights))
    if options.rule == "tsv":
        return spectral.separated(cores, stack.ranks, weights, frame.cutoff)
    summed = small_svd(rules.weighted_sum(cores, weights))
    return spectral.isotropic(summed, frame.cutoff) if options.rule == "iso" else summed
