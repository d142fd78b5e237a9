"""Decompositions that are no low-rank pair: told apart by their tensors, kept, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from artifacts.errors import FileBroken

Make = Callable[..., Any]
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("parts", "kind", "rank", "scaling", "sides"),
    [
        (
            {"hada_w1_a": [320, 4], "hada_w1_b": [4, 320], "hada_w2_a": [320, 4], "hada_w2_b": [4, 320], "alpha": []},
            "loha",
            4,
            0.5,
            (320, 320),
        ),
        ({"lokr_w1": [8, 8], "lokr_w2": [40, 40], "alpha": []}, "lokr", 0, 1.0, (320, 320)),
        ({"lokr_w1": [8, 8], "lokr_w2_a": [40, 4], "lokr_w2_b": [4, 40], "alpha": []}, "lokr", 4, 0.5, (320, 320)),
        ({"oft_blocks": [40, 8, 8], "alpha": []}, "oft", 0, 0.0, (0, 0)),
        ({"oft_blocks": [3, 40, 8, 8], "alpha": []}, "boft", 0, 0.0, (0, 0)),
        ({"on_input": [], "weight": [320]}, "ia3", 0, 0.0, (0, 0)),
        ({"diff": [320, 320]}, "full", 0, 1.0, (320, 320)),
        (
            {"a1.weight": [4, 320], "a2.weight": [320, 4], "b1.weight": [4, 320], "b2.weight": [320, 4]},
            "glora",
            4,
            1.0,
            (0, 0),
        ),
    ],
)
def test_types_are_told_by_their_tensors(
    reading: Make, parts: dict[str, list[int]], kind: str, rank: int, scaling: float, sides: tuple[int, int]
) -> None:
    found = reading({f"{STEM}.{end}": shape for end, shape in parts.items()}, {f"{STEM}.alpha": 2.0})
    (module,) = found.typed
    assert (module.type, module.scaling, (module.d_out, module.d_in)) == (kind, scaling, sides)
    assert module.rank == rank
    assert found.method == kind
    assert not found.modules
    assert kind in found.refusals[0]
    assert {verdict.use for verdict in found.verdicts} == {"kept"}


def test_the_sentinel_alpha_of_a_full_kronecker_product_scales_nothing(reading: Make) -> None:
    shapes = {f"{STEM}.lokr_w1": [8, 8], f"{STEM}.lokr_w2": [40, 40], f"{STEM}.alpha": []}
    (module,) = reading(shapes, {f"{STEM}.alpha": 9999999827968.0}).typed
    assert module.scaling == 1.0


def test_half_a_decomposition_is_refused(reading: Make) -> None:
    with pytest.raises(FileBroken, match="a loha module needs"):
        reading({f"{STEM}.hada_w1_a": [320, 4], f"{STEM}.hada_w1_b": [4, 320]})


def test_a_core_goes_into_the_down_matrix(reading: Make) -> None:
    shapes = {
        f"{CONV}.lora_down.weight": [4, 320, 1, 1],
        f"{CONV}.lora_mid.weight": [4, 4, 3, 3],
        f"{CONV}.lora_up.weight": [320, 4, 1, 1],
    }
    (module,) = reading(shapes).modules
    assert (module.a_shape, module.d_in, module.mid_key) == ((4, 320, 3, 3), 2880, f"{CONV}.lora_mid.weight")


def test_a_core_of_another_rank_is_refused(reading: Make) -> None:
    shapes = {
        f"{CONV}.lora_down.weight": [4, 320, 1, 1],
        f"{CONV}.lora_mid.weight": [4, 2, 3, 3],
        f"{CONV}.lora_up.weight": [320, 4, 1, 1],
    }
    with pytest.raises(FileBroken, match="core"):
        reading(shapes)


def test_an_up_matrix_of_a_convolution_may_be_flat(reading: Make) -> None:
    shapes = {f"{CONV}.lora_down.weight": [4, 320, 3, 3], f"{CONV}.lora_up.weight": [320, 4]}
    (module,) = reading(shapes).modules
    assert (module.kind, module.b_shape) == ("conv", (320, 4, 1, 1))


def test_norms_beside_pairs_make_it_no_lora(reading: Make, pair: Make) -> None:
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    found = reading({**pair(STEM, 320, 320), f"{norm}.w_norm": [320], f"{norm}.b_norm": [320]})
    assert found.method == "lycoris"
    assert [module.type for module in found.typed] == ["norm"]
    assert len(found.modules) == 1


def test_a_magnitude_makes_it_a_dora(reading: Make, pair: Make) -> None:
    found = reading({**pair(STEM, 320, 320), f"{STEM}.dora_scale": [320, 1]})
    assert found.method == "dora"
    assert "DoRA" in found.refusals[0]
    assert found.modules[0].magnitude_key == f"{STEM}.dora_scale"


def test_a_bias_difference_is_not_passed_over(reading: Make, pair: Make) -> None:
    found = reading({**pair(STEM, 320, 320), f"{STEM}.diff_b": [320]})
    assert "biases" in found.refusals[0]
    assert found.verdicts[-1].use != "ignored"
