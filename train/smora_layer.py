"""The linear layer of SMoRA (arXiv:2501.15103): a LoRA whose rank-1 components are chosen anew for every token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from artifacts.errors import NotMergeable
from train.adapted_layers import AdaptedLinear, LowRank


@dataclass(slots=True)
class Tally:
    """Whether the layers count what their routers choose, and of which tokens; one for all layers of a model.

    Attributes:
        counting: whether the forward pass that runs now counts. What activation checkpointing computes again while the
            gradients are made runs after it, and counts nothing.
        mask: (rows, length), 1 at the tokens that count; a layer whose inputs are shaped otherwise counts all.
        gates: also sum up the gates: for the mean gate of every rank.
    """

    counting: bool = False
    mask: Tensor | None = None
    gates: bool = False

    def kept(self, shape: torch.Size) -> Tensor | None:
        """The tokens that count among inputs of this shape (without the features); None: all."""
        if self.mask is None or self.mask.shape != shape:
            return None
        return self.mask.bool()


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that a layer is made of; every token has `active` of `rank` components switched on.

    Attributes:
        partition: components that are switched together: an expert. Divides `rank` and `active`.
        bias_in_gate: the balance bias takes part in the gates, and not in the choice alone.
    """

    rank: int
    active: int
    alpha: float
    partition: int = 1
    bias_in_gate: bool = False

    @property
    def experts(self) -> int:
        return self.rank // self.partition

    @property
    def scaling(self) -> float:
        """alpha/k, so that the total weight of what is switched on does not depend on r."""
        return self.alpha / self.active

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Of a stored adapter's configuration. Raises ValueError when it is none of this type."""
        numbers = [config.get(name) for name in ("r", "active_rank", "rank_partition")]
        alpha, in_gate = config.get("lora_alpha"), config.get("bias_in_gate")
        if not all(type(value) is int and value >= 1 for value in numbers):
            raise ValueError("r, active_rank and rank_partition have to be whole numbers from 1 on")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise ValueError("lora_alpha has to be a number above 0")
        if not isinstance(in_gate, bool):
            raise ValueError("bias_in_gate has to be true or false")
        rank, active, partition = (int(value) for value in numbers if value is not None)
        if active > rank or rank % partition or active % partition:
            raise ValueError(f"{active} of {rank} ranks can not be active in groups of {partition}")
        return cls(rank, active, float(alpha), partition, in_gate)


class SmoraLinear(AdaptedLinear):
    """y = W x + b + alpha/k·Σ g_i·(a_i·x)·b_i over the k components i that the router chooses for the token x.

    q = sigmoid(router·x); chosen are the k largest of q + bias; g_i = k·q_i/Σ q_j over the chosen ones. The gates of
    all components stand in one matrix, tokens × r, that is 0 where a component is off: h = (x·Aᵀ) ∘ G, then h·Bᵀ. So
    the components that are off get a gradient of exactly 0, in A, B and the router, and so does the choice itself.

    The bias balances the load, and no gradient reaches it: `balance` moves it once in an optimiser step, after the
    scheme of arXiv:2408.15664. The entries of an expert of several components would stay equal for ever, so it has one.

    Attributes:
        lora_A: (r, d_in) float32.
        lora_B: (d_out, r) float32, zeros at the start.
        lora_router: (experts, d_in) float32.
        lora_bias: (experts,) float32, a buffer.
        counts: (experts,) int64: tokens that chose each expert since they were last taken.
        gate_sums: (experts,) float64: the sum of every expert's gates over the counted tokens.
        tokens: how many were counted.
    """

    lora_bias: Tensor

    def __init__(self, base: nn.Module, shape: Shape, dropout: float = 0.0, tally: Tally | None = None) -> None:
        super().__init__(base)
        self.shape, self.tally = shape, Tally() if tally is None else tally
        self.dropout = nn.Dropout(dropout)
        device, experts = self.weight.device, shape.experts
        self.lora_A = nn.Parameter(torch.empty(shape.rank, self.d_in, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, shape.rank, dtype=torch.float32, device=device))
        self.lora_router = nn.Parameter(torch.empty(experts, self.d_in, dtype=torch.float32, device=device))
        self.register_buffer("lora_bias", torch.zeros(experts, dtype=torch.float32, device=device))
        for started in (self.lora_A, self.lora_router):
            nn.init.kaiming_uniform_(started, a=math.sqrt(5))
        self.clear()

    @classmethod
    def declared(cls, base: nn.Module, config: Mapping[str, Any]) -> SmoraLinear:
        """The layer that the configuration of a stored adapter describes. Raises ValueError."""
        return cls(base, Shape.of(config))

    def adapter(self, x: Tensor) -> Tensor:
        given = self.dropout(x)
        # One product for the router and A, which both see every input.
        both = functional.linear(given, torch.cat([self.lora_router, self.lora_A]))
        logits, inner = both[..., : self.shape.experts], both[..., self.shape.experts :]
        gates = self.gates(logits.float())
        return functional.linear(inner * (self.shape.scaling * gates), self.lora_B)

    def gates(self, logits: Tensor) -> Tensor:
        """G, (…, r), from the router's (…, experts): exactly k entries of every token are not 0; their sum is k."""
        shape = self.shape
        with torch.no_grad():
            order = torch.sigmoid(logits) + self.lora_bias
            chosen = order.topk(shape.active // shape.partition, dim=-1, sorted=False).indices
        picked = logits.gather(-1, chosen)
        if shape.bias_in_gate:
            values = torch.sigmoid(picked) + self.lora_bias[chosen]
            shares = values / values.sum(-1, keepdim=True)
        else:
            # q/Σq without its underflow: a softmax of log q
            shares = functional.logsigmoid(picked).softmax(-1)
        found = torch.zeros_like(logits).scatter(-1, chosen, shares * (shape.active / shape.partition))
        if self.tally.counting:
            self._count(chosen, found.detach())
        return found.repeat_interleave(shape.partition, dim=-1) if shape.partition > 1 else found

    def delta(self) -> Tensor:
        """Raises NotMergeable: there is no ΔW."""
        raise NotMergeable(
            "A SMoRA layer has no ΔW: what it adds depends on the token.",
            hint="Run it as train.declared.load puts it on the base model.",
        )

    def clear(self) -> None:
        """Forget what was counted."""
        self.counts = torch.zeros(self.shape.experts, dtype=torch.int64, device=self.weight.device)
        self.gate_sums = torch.zeros(self.shape.experts, dtype=torch.float64, device=self.weight.device)
        self.tokens = 0

    @torch.no_grad()
    def balance(self, counts: Tensor, rate: float) -> None:
        """bias_i += rate·sign(c̄ − c_i): what was chosen more than the mean is chosen less from now on."""
        self.lora_bias += rate * torch.sign(counts.sum() - len(counts) * counts)

    def folded(self, mean_gates: Tensor) -> LowRank:
        """The plain LoRA with B·diag(E[g]) in the place of B, without the components whose mean gate is 0.

        Args:
            mean_gates: (experts,) of the tokens that the LoRA is for.
        """
        gates = mean_gates.to(torch.float32).repeat_interleave(self.shape.partition)
        kept = gates.nonzero().flatten()
        scaled = self.lora_B.detach()[:, kept] * (self.shape.scaling * gates[kept])
        return LowRank(self.lora_A.detach()[kept], scaled, 1.0)

    def _count(self, chosen: Tensor, gates: Tensor) -> None:
        kept = self.tally.kept(chosen.shape[:-1])
        if kept is not None:
            chosen, gates = chosen[kept], gates[kept]
        self.counts += torch.bincount(chosen.flatten(), minlength=self.shape.experts)
        if self.tally.gates:
            flat = gates.reshape(-1, self.shape.experts)
            self.gate_sums += flat.double().sum(0)
            self.tokens += len(flat)
