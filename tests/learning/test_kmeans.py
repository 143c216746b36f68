"""Levels and vectors that are learned: the known optima, and what every fit promises."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic.learning import kmeans, levels
from kvmosaic.learning.kmeans import assign


def chain(correlation: float, tokens: int, seed: int) -> Tensor:
    """[tokens, 8]: a Gaussian chain along the channels, unit variance."""
    noise = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    x = [noise[:, 0]]
    for channel in range(1, 8):
        x.append(correlation * x[-1] + (1 - correlation**2) ** 0.5 * noise[:, channel])
    return torch.stack(x, -1)


@pytest.mark.parametrize(
    ("correlation", "coupled", "bits", "error"),  # measured with scikit-learn; methods/cq.md of the specification
    [
        (0.0, 1, 1, 0.365),
        (0.0, 4, 4, 0.346),
        (0.5, 2, 4, 0.094),
        (0.9, 2, 2, 0.163),
        (0.9, 4, 4, 0.096),
        (0.9, 8, 8, 0.075),
    ],
)
def test_coupling_saves_what_correlation_offers(correlation: float, coupled: int, bits: int, error: float) -> None:
    seen, new = (chain(correlation, 16_384, seed).unflatten(1, (-1, coupled)).transpose(0, 1) for seed in (0, 1))
    centroids = kmeans(seen, torch.ones(seen.shape[:2]), 2**bits)
    assert float(assign(new, centroids)[1].mean()) / coupled == pytest.approx(error, rel=0.03)


def loss(x: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    return (weights * assign(x, centroids)[1]).sum(1)


@given(samples=st.integers(30, 200), channels=st.integers(1, 5), count=st.integers(1, 16), seed=st.integers(0, 99))
def test_the_weighted_loss_never_rises_and_the_weights_scale_does_not_matter(
    samples: int, channels: int, count: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, samples, channels, generator=draw) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    weights = torch.rand(3, samples, generator=draw) + 0.01
    losses = [loss(x, weights, kmeans(x, weights, count, iterations=steps, tolerance=0)) for steps in range(1, 9)]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-4) + 1e-6 * x.square().sum((1, 2))).all()
    assert torch.allclose(kmeans(x, 7 * weights, count), kmeans(x, weights, count), rtol=1e-3, atol=1e-4)


def test_as_many_centroids_as_samples_are_the_samples() -> None:
    x = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
    distance = assign(x, kmeans(x, torch.ones(2, 32), 32))[1]
    assert float(distance.max()) < 1e-5


def test_samples_that_are_all_the_same_are_one_centroid() -> None:
    assert torch.equal(kmeans(torch.full((1, 9, 2), 3.0), torch.ones(1, 9), 4), torch.full((1, 4, 2), 3.0))
    assert torch.equal(levels(torch.full((9,), 3.0), torch.ones(9), 4), torch.full((4,), 3.0))


def test_samples_without_weight_count_a_little_and_others_as_told() -> None:
    x = torch.tensor([[[0.0], [0.0], [10.0]]])
    assert float(kmeans(x, torch.tensor([[1.0, 1.0, 0.0]]), 1)) == pytest.approx(10 * 0.001 / (3 + 0.001), rel=1e-3)
    assert float(kmeans(x, torch.zeros(1, 3), 1)) == pytest.approx(10 / 3)


@pytest.mark.parametrize(
    ("bits", "right"),  # Lloyd and Max, of the unit normal law
    [(1, [-0.7979, 0.7979]), (2, [-1.5104, -0.4528, 0.4528, 1.5104])],
)
def test_levels_of_the_normal_law_are_lloyds(bits: int, right: list[float]) -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert levels(x, torch.ones_like(x), 2**bits).tolist() == pytest.approx(right, abs=0.01)


@given(samples=st.integers(16, 300), count=st.integers(1, 16), seed=st.integers(0, 99))
def test_levels_ascend_and_are_means_of_what_they_stand_for(samples: int, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(samples, generator=draw) * 5 + 3, torch.rand(samples, generator=draw) + 0.1
    found = levels(x, weights, count)
    assert (found.diff() >= 0).all()
    code = torch.bucketize(x, (found[1:] + found[:-1]) / 2, right=True)
    weights = weights / weights.mean()
    for each in code.unique():
        mine = code == each
        assert float((x * weights)[mine].sum() / weights[mine].sum()) == pytest.approx(float(found[each]), abs=1e-3)


def test_fewer_samples_than_centroids_are_refused() -> None:
    with pytest.raises(ValueError, match="8 centroids need as many samples at least, got 7"):
        kmeans(torch.zeros(1, 7, 2), torch.ones(1, 7), 8)
    with pytest.raises(ValueError, match="8 levels need as many samples at least, got 7"):
        levels(torch.zeros(7), torch.ones(7), 8)
