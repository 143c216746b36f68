"""How a budget is shared out between layers."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LayerBudgets(Protocol):
    """Settings only; the mean over layers is the budget that was asked for, up to rounding."""

    def share(self, keep: float, layer: int, layers: int) -> float:
        """The share of its tokens that a layer keeps when the mean is to be `keep`."""
        ...


@dataclass(frozen=True)
class Pyramid(LayerBudgets):
    """Shares that fall in even steps, from the lowest layer's to keep/beta (PyramidKV, arXiv:2406.02069).

    Where the lowest layer would keep more than it has, the steps are smaller. The published rule rounds so that it overshoots
    by up to 5 % on small budgets.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError(f"beta is the mean budget over the top layer's, at least 1, got {self.beta}")

    def share(self, keep: float, layer: int, layers: int) -> float:
        if layers == 1:
            return keep
        greatest = min(1.0, keep * (2 - 1 / self.beta))
        return greatest - 2 * (greatest - keep) * layer / (layers - 1)


@dataclass(frozen=True, eq=False)
class Profiled(LayerBudgets):
    """Each next slot to the layer where it retains most importance: greedy over concave profiles, which is optimal
    (XKV, arXiv:2412.05896, section on allocation).

    gains: [layers, points] float32, not increasing along points: what a layer's (i+1)-th hundredth, say, of kept tokens
        adds to the importance that it retains.
    """

    gains: Tensor

    def __post_init__(self) -> None:
        if self.gains.dim() != 2 or bool((self.gains.diff(dim=1) > 1e-6).any()):
            raise ValueError("a profile has one row of gains for each layer, and they do not increase")
        points = self.gains.shape[1]
        # the first layer wins ties, as the sort is stable and layers come first
        order = self.gains.T.flatten().sort(descending=True, stable=True).indices % len(self.gains)
        taken = torch.nn.functional.one_hot(order, len(self.gains)).cumsum(0) / points
        object.__setattr__(self, "_taken", taken)  # [layers * points, layers]

    def share(self, keep: float, layer: int, layers: int) -> float:
        if layers != len(self.gains):
            raise ValueError(f"the profile is of a model with {len(self.gains)} layers, and this one has {layers}")
        taken: Tensor = getattr(self, "_taken")  # noqa: B009 (no field: derived)
        slots = min(len(taken), round(keep * len(taken)))
        return float(taken[slots - 1, layer]) if slots else 0.0


def retained(scores: Tensor, points: int) -> Tensor:
    """The gains of one layer from its scores [B, H, T] of one prompt: [points], which sum to 1.

    One slot is one token in every head, each head choosing its own.
    """
    ranked = scores.float().sort(dim=-1, descending=True).values.sum((0, 1))
    total = torch.cat([ranked.new_zeros(1), (ranked / ranked.sum()).cumsum(0)])  # retained by 0, 1, ... T slots
    place = torch.linspace(0, len(ranked), points + 1)
    below = place.floor().long().clamp_max(len(ranked) - 1)
    return torch.lerp(total[below], total[below + 1], place - below).diff()
