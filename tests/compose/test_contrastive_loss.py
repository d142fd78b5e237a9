"""NT-Xent on maps against its formula, written out with loops."""

from __future__ import annotations

import math

import pytest
import torch

from compose.contrastive_loss import class_vectors, contrastive_loss

TIGHT = 1e-5
LABELS = torch.tensor([0, 0, 1, 1, 1])


def by_hand(vectors: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """Each ordered pair of one class: −log of its share among itself and the anchor's negatives."""
    terms = []
    count = len(labels)
    for i in range(count):
        for j in range(count):
            if i == j or labels[i] != labels[j]:
                continue
            score = [float(torch.cosine_similarity(vectors[i], vectors[k], dim=0)) / temperature for k in range(count)]
            negatives = sum(math.exp(score[k]) for k in range(count) if labels[k] != labels[i])
            terms.append(-math.log(math.exp(score[j]) / (math.exp(score[j]) + negatives)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_it_is_the_formula(temperature: float) -> None:
    vectors = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    ours = float(contrastive_loss(vectors, LABELS, temperature))
    assert ours == pytest.approx(by_hand(vectors.double(), LABELS, temperature), abs=TIGHT)


def test_bounds_at_identical_and_at_disjoint_maps() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    same = torch.ones(6, 8)
    assert float(contrastive_loss(same, labels, 0.5)) == pytest.approx(math.log(1 + 3), abs=TIGHT)
    apart = torch.zeros(6, 8)
    apart[:3, :4], apart[3:, 4:] = 1, 1
    assert float(contrastive_loss(apart, labels, 0.5)) == pytest.approx(math.log(1 + 3 * math.exp(-2)), abs=TIGHT)


def test_without_a_positive_pair_it_is_zero_with_a_gradient_of_zero() -> None:
    vectors = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss = contrastive_loss(vectors, torch.tensor([0, 1]), 0.5)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert float(loss.detach()) == 0.0
    assert not bool(gradient.any())


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no negatives"):
        contrastive_loss(torch.rand(2, 4), torch.tensor([0, 0]), 0.5)


def test_vectors_are_stretched_maps_of_every_token_in_every_branch() -> None:
    maps = [torch.rand(6, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    maps[1][:, 4] = 0.25
    vectors, labels = class_vectors(maps, [[(1,), (2, 3)], [(4,), (4,)]])
    assert labels.tolist() == [0, 0, 0, 1, 1]
    expected = (maps[1][:, 3] - maps[1][:, 3].min()) / (maps[1][:, 3].max() - maps[1][:, 3].min())
    torch.testing.assert_close(vectors[2], expected, atol=1e-6, rtol=0)
    assert not bool(vectors[4].any())  # a constant map is no NaN


def test_gradient_moves_concepts_apart() -> None:
    maps = torch.rand(4, 9, generator=torch.Generator().manual_seed(4)).double().requires_grad_(True)
    labels = torch.tensor([0, 0, 1, 1])
    loss = contrastive_loss(maps, labels, 0.5)
    (gradient,) = torch.autograd.grad(loss, maps)
    moved = maps.detach() - 0.05 * gradient
    assert float(contrastive_loss(moved, labels, 0.5)) < float(loss.detach())
