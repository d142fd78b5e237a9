"""Masks and the weights that they become."""

from __future__ import annotations

import pytest
import torch

from compose.fusion import fuse
from compose.masks import branch_masks, coverage, mask_weights, refined_mask, token_mask
from compose.options.clora import CloraMaskOnlyOptions
from compose.scene import Prediction

PLAIN = CloraMaskOnlyOptions()


def test_a_token_is_measured_by_its_own_maximum_and_tokens_are_joined() -> None:
    maps = torch.zeros(6, 3)
    maps[0, 0], maps[1, 0], maps[2, 0] = 1.0, 0.31, 0.3  # the limit itself is outside
    maps[5, 1] = 1e-6
    assert token_mask(maps, (0, 1), 0.3, (2, 3)).tolist() == [[1, 1, 0], [0, 0, 1]]
    assert not bool(token_mask(maps, (), 0.3, (2, 3)).any())


@pytest.mark.parametrize("options", [PLAIN, CloraMaskOnlyOptions(mask_threshold=0.7, mask_closing=True)])
def test_the_masks_of_all_branches_are_those_of_each(options: CloraMaskOnlyOptions) -> None:
    maps = list(torch.rand(4, 8 * 6, 7, generator=torch.Generator().manual_seed(3)).pow(3))
    tokens = [(), (2,), (1, 2, 5), (6, 0)]
    alone = [token_mask(one, own, options.mask_threshold, (8, 6)) for one, own in zip(maps, tokens, strict=True)]
    expected = torch.stack([refined_mask(mask, options) for mask in alone])
    assert torch.equal(branch_masks(maps, tokens, (8, 6), options), expected)
    assert 0 < float(expected.mean()) < 1


def test_a_peak_of_a_map_that_is_not_square_stays_in_its_row_and_column() -> None:
    maps = torch.full((8 * 4, 2), 0.01)
    maps[6 * 4 + 1, 1] = 1.0  # row 6, column 1 of a grid 8 high and 4 wide
    masks = branch_masks([maps, maps], [(), (1,)], (8, 4), PLAIN)
    weights = mask_weights(masks, (32, 16))
    assert weights.shape == (2, 1, 32, 16)
    inside = weights[1, 0] == 1
    assert inside.nonzero().amin(dim=0).tolist() == [24, 4]
    assert inside.nonzero().amax(dim=0).tolist() == [27, 7]


@pytest.mark.parametrize("kind", ["random", "empty", "full", "overlapping"])
@pytest.mark.parametrize("base_branch", [True, False])
def test_weights_sum_to_one_everywhere(kind: str, base_branch: bool) -> None:
    masks = {
        "random": (torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.6).float(),
        "empty": torch.zeros(3, 4, 6),
        "full": torch.ones(3, 4, 6),
        "overlapping": torch.ones(3, 4, 6) * torch.tensor([0.0, 1.0, 1.0])[:, None, None],
    }[kind]
    weights = mask_weights(masks, (8, 12), base_branch=base_branch)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(1, 8, 12))
    assert bool((weights >= 0).all())


def test_background_is_the_base_and_shared_cells_are_shared() -> None:
    masks = torch.tensor([[[0.0, 0, 0]], [[1.0, 1, 0]], [[0.0, 1, 0]]])
    weights = mask_weights(masks, (1, 3))[:, 0, 0]
    assert weights.T.tolist() == [[0, 1, 0], [0, 0.5, 0.5], [1, 0, 0]]
    assert coverage(mask_weights(masks, (1, 3))) == pytest.approx([1 / 3, 2 / 3, 1 / 3])


def test_morphology_in_its_order() -> None:
    dot = torch.zeros(7, 7)
    dot[3, 3] = 1
    hole = 1 - dot
    assert int(refined_mask(dot, CloraMaskOnlyOptions(mask_dilate=True)).sum()) == 9
    assert int(refined_mask(dot, CloraMaskOnlyOptions(mask_erode=True)).sum()) == 0
    assert int(refined_mask(dot, CloraMaskOnlyOptions(mask_dilate=True, mask_erode=True)).sum()) == 1
    assert int(refined_mask(dot, CloraMaskOnlyOptions(mask_opening=True)).sum()) == 0
    assert int(refined_mask(hole, CloraMaskOnlyOptions(mask_closing=True)).sum()) == 49
    assert torch.equal(refined_mask(dot, PLAIN), dot)


def test_fused_noise_is_each_branchs_own_inside_its_disc() -> None:
    """Planted maps with known discs: what the masks do, without any model."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    discs = [((rows - 4) ** 2 + (columns - 4) ** 2 <= 9), ((rows - 11) ** 2 + (columns - 11) ** 2 <= 9)]
    assert not bool((discs[0] & discs[1]).any())
    maps = [torch.zeros(256, 3), *(torch.full((256, 3), 1e-3) for _ in discs)]
    for branch, disc in enumerate(discs, start=1):
        maps[branch][disc.flatten(), branch] = 1.0
    weights = mask_weights(branch_masks(maps, [(), (1,), (2,)], (16, 16), PLAIN), (32, 32))
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(2, 1, 4, 32, 32, generator=generator) for _ in range(3)]
    fused = fuse([Prediction(uncond, cond) for uncond, cond in noises], weights)
    wide = [disc.repeat_interleave(2, 0).repeat_interleave(2, 1) for disc in discs]
    for half, values in ((0, fused.uncond), (1, fused.cond)):
        assert values is not None
        for branch, disc in enumerate([~(wide[0] | wide[1]), *wide]):
            assert torch.equal(values[..., disc], noises[branch][half][..., disc])
