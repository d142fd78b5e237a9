"""Which grid of cross-attention makes the maps. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from artifacts.errors import ComposeRefused, FieldError

SUITABLE_SIDE = 16
"""Cells a side that a grid should have at the model's native size (arXiv:2403.19776 takes maps of 16×16)."""
_POINTER = "/parameters/map_grid"


def choose_grid(factors: Collection[int], native_side: int, wanted: int | None = None) -> int:
    """How many latent pixels a side are one cell of the maps.

    The coarsest grid with at least `SUITABLE_SIDE` cells a side at the model's native size, or the finest of all if
    none has as many: 4 for Stable Diffusion (16×16 of 64×64) and SDXL (32×32 of 128×128).

    Args:
        factors: by which grids with cross-attention are coarser than the latent.
        native_side: of the latent, in its pixels.

    Raises:
        ComposeRefused: the UNet has no cross-attention, or none on the grid that is asked for.
    """
    known = sorted(set(factors))
    if not known:
        raise ComposeRefused("The UNet has no cross-attention, so that words have no place in the picture.")
    if wanted is None:
        suitable = [factor for factor in known if native_side // factor >= SUITABLE_SIDE]
        return suitable[-1] if suitable else known[0]
    if wanted not in known:
        listed = ", ".join(map(str, known))
        raise ComposeRefused(
            f"The UNet has no cross-attention on a grid {wanted} times coarser than the latent.",
            hint=f"It has some at {listed}.",
            errors=[FieldError(_POINTER, f"must be one of {listed}")],
        )
    return wanted
