"""RevNet, an invertible non-linear map, and the exchange of its coordinates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Coupling(nn.Module):
    """An exactly invertible RevNet block: y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁).

    F and G have one hidden ReLU layer. x₁ is the first half of the coordinates (for an odd number, the smaller half).
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.split = width // 2
        first, second = self.split, width - self.split
        self.f = nn.Sequential(nn.Linear(second, hidden), nn.ReLU(), nn.Linear(hidden, first))
        self.g = nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, second))

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Map x to y."""
        a = x[:, : self.split] + self.f(x[:, self.split :])
        return torch.cat([a, x[:, self.split :] + self.g(a)], dim=1)

    def inverse(self, y: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Map y to x."""
        b = y[:, self.split :] - self.g(y[:, : self.split])
        return torch.cat([y[:, : self.split] - self.f(b), b], dim=1)


class RevNet(nn.Module):
    """A sequence of couplings φ.

    It follows the released code of "The Non-Linear Representation Dilemma". Activations are first divided by ``scale``,
    a fixed number that brings them to unit size.
    """

    def __init__(self, width: int, blocks: int, hidden: int, scale: float):
        super().__init__()
        if width < 2:
            raise ValueError("a coupling needs at least two coordinates")
        self.layers, self.scale = nn.ModuleList(Coupling(width, hidden) for _ in range(blocks)), scale

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Map x to φ(x)."""
        x = x / self.scale
        for layer in self.layers:
            x = layer(x)
        return x

    def inverse(self, y: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Map y to φ⁻¹(y)."""
        for layer in list(self.layers)[::-1]:
            assert isinstance(layer, Coupling)
            y = layer.inverse(y)
        return y * self.scale


class Exchange(nn.Module):
    """φ⁻¹ of φ(source) in the first coordinates and φ(base) in the others.

    ``rank``: the number of first coordinates.
    """

    def __init__(self, bijection: RevNet, rank: int):
        super().__init__()
        self.bijection, self.rank = bijection, rank

    def forward(
        self, base: Float[Tensor, "batch width"], source: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width"]:
        """The base activations after the exchange."""
        mapped_base, mapped_source = self.bijection(base), self.bijection(source)
        return self.bijection.inverse(torch.cat([mapped_source[:, : self.rank], mapped_base[:, self.rank :]], dim=1))
