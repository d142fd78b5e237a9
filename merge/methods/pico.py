"""Pico (arXiv:2604.16826): output directions that the adapters share crowd a merge, so they are scaled down first.

With the left singular basis U, σ of hstack(Bᵢ) and eⱼ = σⱼ²/Σσ², direction j of every Bᵢ is multiplied by
1/(1 + (N−1)·eⱼ); the calibrated deltas are merged by a rule, and the result gets the mean norm of the deltas back.
"""

from __future__ import annotations

import torch

from merge import spectral
from merge.core import CoreFrame
from merge.methods.core_space import merged_core
from merge.peer_options import PicoOptions
from merge.result import MergedModule
from merge.stack import Stack


def merge(stack: Stack, options: PicoOptions, rank: int) -> MergedModule:
    """Merge one module in its core frame, whose left basis is that of hstack(Bᵢ)."""
    frame = CoreFrame.of(stack, "both" if options.rule == "ties" else "left")
    cores = frame.cores()
    # U is the singular basis of B, so the rows of UᵀB are orthogonal and their squared norms are σ²
    energy = frame.in_left.square().sum(1)
    total = energy.sum()
    share = energy / total if float(total) > 0 else energy
    calibration = 1 / (1 + (len(cores) - 1) * share)
    merged = merged_core(frame, cores * calibration[:, None], options)
    norm = merged.S.norm()
    target = (cores.flatten(1).norm(dim=1) * stack.owner_weights.abs()).mean()
    gain = float(target / norm) if float(norm) > 0 else 1.0
    figures = {"largest_share": float(torch.max(share)), "gain": gain}
    return frame.merged(spectral.scaled(merged, gain * options.scale), rank, figures)
