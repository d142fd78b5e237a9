"""CLoRA's contrastive loss on attention maps (arXiv:2403.19776): NT-Xent over all branches, one class per concept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_EPS = 1e-8


def contrastive_loss(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over ordered pairs (i, j), i ≠ j, of one class of
    −log( e^{s_ij/τ} / (e^{s_ij/τ} + Σ_{k: y_k ≠ y_i} e^{s_ik/τ}) ), s the cosine.

    The denominator has that one positive and all the anchor's negatives; other positives are left out.

    Args:
        vectors: (n, cells). labels: (n,) integers. temperature: τ.

    Returns:
        A scalar; 0 without gradient where no class has two vectors.
    """
    unit = functional.normalize(vectors.float(), dim=1, eps=_EPS)
    similarity = unit @ unit.T / temperature
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if not bool(positive.any()):
        return similarity.sum() * 0.0
    if bool(same.all()):
        raise ValueError("one class has no negatives to be told from")
    negatives = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    return (torch.logaddexp(similarity, negatives) - similarity)[positive].mean()


def class_vectors(maps: Sequence[Tensor], groups: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """One vector per concept, branch and token: the token's map, stretched to [0, 1].

    Args:
        maps: (h·w, tokens) of each branch. groups: [concept][branch] → token positions.

    Returns:
        (n, h·w) float32 and (n,) the concepts' numbers.
    """
    rows, labels = [], []
    for concept, branches in enumerate(groups):
        for branch, tokens in zip(maps, branches, strict=True):
            for token in tokens:
                rows.append(_stretched(branch[:, token].float()))
                labels.append(concept)
    return torch.stack(rows), torch.tensor(labels, device=rows[0].device)


def _stretched(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low + _EPS)
