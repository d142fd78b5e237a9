"""The stack of one module: the rank components of all its owners side by side, scalings folded in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.algebra import (
    CoreSvd,
    Spectrum,
    core_matrix,
    delta_products,
    gram_triangular,
    householder_triangular,
    small_svd,
)
from artifacts.errors import MergeRefused
from merge.gram import gram
from merge.plan import PlannedModule
from merge.products import of_columns, of_rows, same_prefixes
from merge.spectral import scaled

SAMPLED_ENTRIES = 8
"""Entries of a and of b by which components are ordered; full vectors are compared only where these all agree."""

FIRST_ENTRIES = 3
"""Of these the first that are looked at."""

OF_NO_WEIGHT = ("gram_A", "gram_B", "plain_A", "plain_B", "triangular_A", "triangular_B")
"""What a stack computes of its components alone."""


@dataclass(frozen=True, eq=False)
class Stack:
    """All rank components of one module; ΔWᵢ = Σ_{p owned by i} b_p·a_pᵀ.

    √|s| is folded into both halves and the sign of s into b, so that the scaling is 1 and a component does not
    depend on how its adapter split ΔW between factors and scaling.

    Components stand in an order that their contents alone decide, so that no result depends, not by one bit, on the
    order of the adapters in a request or of the components in an adapter.

    Attributes:
        A: (n, d_in); B: (d_out, n), in the compute dtype.
        owners: (n,) position of the adapter among the inputs.
        weights: (n,) float64, the weight of the owner.
        places: (n,) the component's row in its adapter's own lora_A, for methods that pair components by it.
        scalings: (n,) float64, the scaling s that is folded in.
    """

    A: Tensor
    B: Tensor
    owners: Tensor
    weights: Tensor
    places: Tensor
    scalings: Tensor

    @classmethod
    def load(
        cls,
        module: PlannedModule,
        adapters: Mapping[int, Adapter],
        weights: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Read and cast the factors of one module.

        Raises:
            MergeRefused: NaN or infinite numbers.
        """
        parts_A, parts_B, roots, owners, unit_weights = [], [], [], [], []
        places: list[int] = []
        scalings: list[float] = []
        for owner, description in module.owners:
            factors = adapters[owner].factors(description)
            parts_A.append(factors.A)
            parts_B.append(factors.B)
            signed_root = math.copysign(math.sqrt(abs(factors.scaling)), factors.scaling)
            roots += [signed_root] * factors.rank
            owners += [owner] * factors.rank
            places += range(factors.rank)
            scalings += [factors.scaling] * factors.rank
            unit_weights += [weights[owner]] * factors.rank
        # Concatenated in the stored precision and cast as a whole: half the bytes move, and mixed-precision kernels,
        # which are slow, are never used.
        root = torch.tensor(roots, dtype=dtype, device=device)
        A = _concatenated(parts_A, 0).to(device=device, dtype=dtype).mul_(root.abs()[:, None])
        B = _concatenated(parts_B, 1).to(device=device, dtype=dtype).mul_(root)
        for owner, _ in module.owners:
            adapters[owner].release(module.path)
        stack = cls(
            A,
            B,
            torch.tensor(owners, device=device),
            torch.tensor(unit_weights, dtype=torch.float64, device=device),
            torch.tensor(places, device=device),
            torch.tensor(scalings, dtype=torch.float64, device=device),
        ).ordered()
        stack.require_finite(module, adapters)
        return stack

    def require_finite(self, module: PlannedModule, adapters: Mapping[int, Adapter]) -> None:
        """Raises MergeRefused, naming the adapters at fault, when a number is NaN or infinite."""
        energy = self.gram_A.diagonal() + self.gram_B.diagonal()
        if bool(torch.isfinite(energy).all()):
            return
        at_fault = sorted({int(owner) for owner in self.owners[~torch.isfinite(energy)]})
        raise MergeRefused(
            f"Module {module.path} holds NaN or infinite numbers (or its norms overflow) in the adapters at positions "
            f"{at_fault} of the {len(adapters)} that are merged.",
            hint="The upload's report lists the non-finite tensors of each adapter.",
        )

    @property
    def size(self) -> int:
        """n, the number of components."""
        return self.A.shape[0]

    @cached_property
    def gram_A(self) -> Tensor:
        """(n, n) float64 inner products of the a's."""
        return gram(self.A)

    @cached_property
    def gram_B(self) -> Tensor:
        """(n, n) float64 inner products of the b's."""
        return gram(self.B, columns=True)

    @cached_property
    def members(self) -> tuple[tuple[int, Tensor], ...]:
        """Each owner with the positions of its components, in an order that contents decide, not the request."""
        owners = dict.fromkeys(self.owners.tolist())
        return tuple((owner, (self.owners == owner).nonzero()[:, 0]) for owner in owners)

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many components each owner has, in the order of `members`."""
        return tuple(len(own) for _, own in self.members)

    @cached_property
    def owner_weights(self) -> Tensor:
        """(N,) float64 weights of the owners, in the order of `members`."""
        return torch.stack([self.weights[own[0]] for _, own in self.members])

    @cached_property
    def products(self) -> Tensor:
        """(N, N) float64 Frobenius inner products ⟨ΔWᵢ, ΔWⱼ⟩ of the owners, in the order of `members`."""
        position = torch.empty_like(self.owners)
        for number, (_, own) in enumerate(self.members):
            position[own] = number
        return delta_products(self.gram_A, self.gram_B, position, len(self.members))

    @cached_property
    def energy(self) -> float:
        """‖Σ wᵢΔWᵢ‖²_F."""
        return max(float(self.weights @ ((self.gram_A * self.gram_B) @ self.weights)), 0.0)

    @cached_property
    def plain_A(self) -> tuple[Tensor, Tensor] | None:
        """`artifacts.algebra.gram_triangular` of the a's."""
        return gram_triangular(self.gram_A)

    @cached_property
    def plain_B(self) -> tuple[Tensor, Tensor] | None:
        """`artifacts.algebra.gram_triangular` of the b's."""
        return gram_triangular(self.gram_B)

    @cached_property
    def triangular_A(self) -> tuple[Tensor, Tensor]:
        """T and T⁺ of Aᵀ = Q·T, as `artifacts.algebra.triangular`."""
        return self.plain_A or householder_triangular(self.A.T, self.gram_A)

    @cached_property
    def triangular_B(self) -> tuple[Tensor, Tensor]:
        """T and T⁺ of B = Q·T."""
        return self.plain_B or householder_triangular(self.B, self.gram_B)

    @cached_property
    def core(self) -> Spectrum:
        """The SVD of Σ wᵢΔWᵢ in the bases of `triangular_B` and `triangular_A`, as an n×n matrix."""
        return small_svd(core_matrix(self.triangular_A[0], self.triangular_B[0], self.weights))

    def svd(self, scale: float = 1.0) -> CoreSvd:
        """Of scale·Σ wᵢΔWᵢ. Computed once, however many methods ask for it."""
        if scale not in self._svds:
            U, S, V = scaled(self.core, scale)
            self._svds[scale] = CoreSvd(S, self.triangular_B[1] @ U, self.triangular_A[1] @ V)
        return self._svds[scale]

    @cached_property
    def _svds(self) -> dict[float, CoreSvd]:
        return {}

    def best(self, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The best factors (rank, d_in) and (d_out, rank) of scale·Σ wᵢΔWᵢ, √σ on either side. Computed once.

        Those of a smaller rank are a part of them.
        """
        if (rank, scale) not in self._best:
            larger = [pair for (held, of), pair in self._best.items() if held > rank and of == scale]
            if larger and same_prefixes(self.A) and same_prefixes(self.B):
                A, B = larger[0]
                self._best[rank, scale] = A[:rank], B[:, :rank].contiguous()
            else:
                right, left = self.svd(scale).halves(rank)
                self._best[rank, scale] = of_rows(right, self.A), of_columns(self.B, left)
        return self._best[rank, scale]

    @cached_property
    def _best(self) -> dict[tuple[int, float], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def largest(self) -> Tensor:
        """(n,) float64 largest |entry| of each component's a and b."""
        # torch.aminmax would save the copies and is 15 times slower on a CPU
        return torch.maximum(self.A.abs().amax(dim=1), self.B.abs().amax(dim=0)).double()

    def with_factors(self, A: Tensor, B: Tensor) -> Self:
        """Other components in the same places."""
        return type(self)(A, B, self.owners, self.weights, self.places, self.scalings)

    def with_weights(self, weights: Tensor) -> Self:
        """The same components under other weights, (n,) float64, with what is known of them and depends on none."""
        found = type(self)(self.A, self.B, self.owners, weights, self.places, self.scalings)
        vars(found).update({name: vars(self)[name] for name in OF_NO_WEIGHT if name in vars(self)})
        return found

    def scaled(self, factors: Mapping[int, float]) -> Self:
        """Every ΔWᵢ multiplied by the factor of its owner, the root of it on either side."""
        by_component = [factors[owner] for owner in self.owners.tolist()]
        root = torch.tensor(by_component, dtype=self.A.dtype, device=self.A.device).sqrt()
        return self.with_factors(self.A * root[:, None], self.B * root).ordered()

    def reweighted(self, weights: Sequence[float]) -> Self:
        """The same components under other weights, one for each adapter: bit for bit what `load` gives for them."""
        of_unit = torch.tensor(weights, dtype=torch.float64, device=self.weights.device)[self.owners]
        if torch.equal(of_unit, self.weights):
            return self
        return self.with_weights(of_unit).ordered()

    def bare(self) -> Self:
        """The same components and inner products, without what methods have computed of them."""
        return self.with_weights(self.weights)

    def ordered(self) -> Self:
        """The same components in the order of their contents."""
        order = torch.from_numpy(_content_order(self.A, self.B, self.weights)).to(self.A.device)
        if bool((order[1:] > order[:-1]).all()):
            return self
        A, B = self.A.index_select(0, order), self.B.index_select(1, order)
        return type(self)(A, B, self.owners[order], self.weights[order], self.places[order], self.scalings[order])


def _concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor, in the widest dtype among the parts. Always a copy: the parts are views of files."""
    if len({part.dtype for part in parts}) > 1:  # torch promotes no floats of 8 bits
        parts = [part.float() if part.element_size() == 1 else part for part in parts]
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0].clone()


def _content_order(A: Tensor, B: Tensor, weights: Tensor) -> NDArray[np.int64]:
    sides = A.shape[1], B.shape[0]
    columns, rows = (np.linspace(0, side - 1, SAMPLED_ENTRIES).astype(np.int64).tolist() for side in sides)
    sample = torch.cat([A[:, columns].double(), B[rows].T.double(), weights[:, None]], dim=1).cpu().numpy()
    # the first few mostly tell all apart, and then the others change nothing
    for keys in (sample[:, :FIRST_ENTRIES], sample):
        order = np.lexsort(keys.T[::-1])
        ordered = keys[order]
        if not (ordered[1:] == ordered[:-1]).all(axis=1).any():
            return order
    full = torch.cat([A.double(), B.T.double(), weights[:, None]], dim=1).cpu().numpy()
    return np.lexsort(full.T[::-1])
