"""Weighted k-means: of vectors (many problems at once), and of plain numbers (exact, by sorting)."""

import torch
from torch import Tensor

AT_ONCE = 2**24
"""Distances held at a time (64 MiB in float32)."""


def kmeans(
    x: Tensor, weights: Tensor, count: int, *, iterations: int = 50, tolerance: float = 1e-4, seed: int = 0
) -> Tensor:
    """x [P, N, c], weights [P, N] not negative -> centroids [P, count, c] float32, of P problems side by side.

    Starts by k-means++; a centroid that nobody chooses moves to the farthest sample. Stops after `iterations`, or when
    the weighted loss of all problems together falls by no more than `tolerance` of it. The factor of the weights does not matter.
    Raises ValueError for fewer samples than centroids.
    """
    problems, samples, channels = x.shape
    if samples < count:
        raise ValueError(f"{count} centroids need as many samples at least, got {samples}")
    x, weights = x.float(), _without_zeros(weights)
    centroids = _spread(x, weights, count, torch.Generator(x.device).manual_seed(seed))
    offset = torch.arange(problems, device=x.device)[:, None] * count
    before = torch.tensor(torch.inf, device=x.device)
    for _ in range(iterations):
        nearest, distance = assign(x, centroids)
        loss = (weights * distance).sum()
        if bool(before - loss <= tolerance * loss):
            break
        before = loss
        index = (nearest + offset).flatten()
        mass = x.new_zeros(problems * count).index_add_(0, index, weights.flatten())
        total = x.new_zeros(problems * count, channels).index_add_(0, index, (x * weights[..., None]).flatten(0, 1))
        mass, total = mass.view(problems, count), total.view(problems, count, channels)
        centroids = torch.where(mass[..., None] > 0, total / mass[..., None].clamp_min(1e-38), centroids)
        for problem in (mass == 0).any(1).nonzero()[:, 0].tolist():
            empty = (mass[problem] == 0).nonzero()[:, 0]
            far = (weights[problem] * distance[problem]).topk(len(empty)).indices
            centroids[problem, empty] = x[problem, far]
    return centroids


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """x [P, N, c] -> the nearest of the centroids [P, K, c] and the squared distance to it, [P, N] each."""
    half = centroids.square().sum(-1)[:, None] / 2
    found = []
    for part in x.split(max(1, AT_ONCE // (len(x) * centroids.shape[1])), 1):
        least = torch.baddbmm(half, part, centroids.mT, alpha=-1).min(-1)
        found.append((least.indices, (2 * least.values + part.square().sum(-1)).clamp_min(0)))
    return torch.cat([each for each, _ in found], 1), torch.cat([each for _, each in found], 1)


def _spread(x: Tensor, weights: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """k-means++: each next centroid is a sample, drawn by its weighted squared distance to those before."""
    problem = torch.arange(len(x), device=x.device)
    chosen = [x[problem, torch.multinomial(weights, 1, generator=draw)[:, 0]]]
    distance = (x - chosen[0][:, None]).square().sum(-1)
    while len(chosen) < count:
        chance = distance * weights
        chance = torch.where(chance.sum(1, keepdim=True) > 0, chance, weights)  # fewer different samples than centroids
        chosen.append(x[problem, torch.multinomial(chance, 1, generator=draw)[:, 0]])
        distance = torch.minimum(distance, (x - chosen[-1][:, None]).square().sum(-1))
    return torch.stack(chosen, 1)


def levels(x: Tensor, weights: Tensor, count: int, *, iterations: int = 200) -> Tensor:
    """x, weights [N] -> [count] float32, ascending: the levels to which numbers are rounded with least weighted error.

    A local optimum (Lloyd's), from quantiles. Raises ValueError for fewer samples than levels.
    """
    if len(x) < count:
        raise ValueError(f"{count} levels need as many samples at least, got {len(x)}")
    x, order = x.double().sort()
    weights = _without_zeros(weights[order]).double()
    zero = x.new_zeros(1)
    mass, moment = torch.cat([zero, weights.cumsum(0)]), torch.cat([zero, (weights * x).cumsum(0)])
    place = (torch.arange(count, device=x.device) + 0.5) / count * mass[-1]
    found = x[torch.searchsorted(mass[1:], place).clamp_max(len(x) - 1)]
    for _ in range(iterations):
        edge = torch.searchsorted(x, (found[1:] + found[:-1]) / 2)
        edge = torch.cat([edge.new_zeros(1), edge, edge.new_full((1,), len(x))])
        inside = mass[edge].diff()
        moved = torch.where(inside > 0, moment[edge].diff() / inside.clamp_min(1e-300), found)
        done = bool((moved - found).abs().max() <= 1e-9 * x.abs().max())
        found = moved
        if done:
            break
    return found.float()


def _without_zeros(weights: Tensor) -> Tensor:
    """Samples that the loss does not feel (the last token) still count a little, and the mean weight is 1."""
    mean = weights.float().mean(-1, keepdim=True)
    return torch.where(mean > 0, weights.float() / mean.clamp_min(1e-38), 1.0).clamp_min(1e-3)
