"""What the graph of a pass keeps for its way back: measured on the first, which foretells what several of them take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, is_grad_enabled, nn
from torch.autograd.graph import saved_tensors_hooks

from compose.latent_update import MapsOf

SHARE = 0.5
"""Of the free memory, what graphs may take that are held at once: the way back needs some more, and so may others."""


@dataclass(slots=True)
class GraphMeter:
    """Measures the first pass with a graph.

    Attributes:
        model: whose weights are there anyway.
        bytes: that the graph keeps, each storage once; None until there was one.
    """

    model: nn.Module
    bytes: int | None = None
    _storages: dict[int, int] = field(default_factory=dict, repr=False)

    def watched(self, maps_of: MapsOf) -> MapsOf:
        """The same maps."""

        def watching(indices: Sequence[int], latents: Tensor) -> list[Tensor]:
            if self.bytes is not None or not is_grad_enabled():
                return maps_of(indices, latents)
            weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
            self._storages.clear()
            with saved_tensors_hooks(self._note, lambda tensor: tensor):
                found = maps_of(indices, latents)
            self.bytes = sum(size for place, size in self._storages.items() if place not in weights)
            return found

        return watching

    def _note(self, tensor: Tensor) -> Tensor:
        # what the graph keeps stays where it is, so that its place names it
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def fits(self, graphs: int, free: int) -> bool:
        """Whether so many graphs may be held at once in so much free memory; not before one was measured."""
        return self.bytes is not None and graphs * self.bytes <= SHARE * free
