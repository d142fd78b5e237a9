"""What a graph keeps is counted: each storage once, weights left out, the first pass with a graph only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compose_counts import peak_bytes
from compose.graph_memory import GraphMeter
from compose.latent_update import cached_gradient, joint_gradient

SIZE = 1000


def test_storages_are_counted_once_and_weights_are_not() -> None:
    layer = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    meter = GraphMeter(layer)

    def maps_of(indices: Sequence[int], latents: Tensor) -> list[Tensor]:
        bent = latents.exp()  # keeps its result, which the product of both its halves keeps again
        both = bent[:, :SIZE] * bent[:, SIZE:]
        return [layer(both) for _ in indices]  # keeps its weight

    watched = meter.watched(maps_of)
    latents = torch.rand(4, 2 * SIZE)
    with torch.no_grad():
        watched([0], latents)
    assert meter.bytes is None
    found = watched([0], latents.requires_grad_(True))
    assert meter.bytes == 4 * 2 * SIZE * 4
    watched([0, 1], torch.rand(40, 2 * SIZE, requires_grad=True))
    assert meter.bytes == 4 * 2 * SIZE * 4
    plain = torch.autograd.grad(maps_of([0], latents)[0].sum(), latents)[0]
    assert torch.equal(torch.autograd.grad(found[0].sum(), latents)[0], plain)


def test_graphs_fit_into_half_of_what_is_free() -> None:
    meter = GraphMeter(nn.Identity())
    assert not meter.fits(1, 10**12)
    meter.bytes = 100
    assert (meter.fits(3, 600), meter.fits(3, 599)) == (True, False)


def test_it_foretells_what_an_update_takes(sd: Any, pipelines: Any) -> None:
    """All graphs at once against one at a time: the difference is that of the other branches' graphs."""
    from test_clora import prepared

    with prepared(sd.request(parameters={"batch_branches": "never"}), pipelines) as (method, latents, timestep):

        def maps_of(indices: Sequence[int], z: Tensor) -> list[Tensor]:
            found: list[Tensor] = method.branches.maps(indices, z, timestep)
            return found

        cached_gradient(latents, 3, method.meter.watched(maps_of), method._loss)
        one, every = (
            peak_bytes(lambda way=way: way(latents, 3, maps_of, method._loss))  # type: ignore[misc]
            for way in (cached_gradient, joint_gradient)
        )
    foretold = method.meter.bytes
    assert foretold is not None
    assert 0.8 * 2 * foretold <= every - one <= 1.2 * 2 * foretold
