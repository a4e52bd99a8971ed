"""Distances between two sets of samples.

Every distance takes x of shape (N, D) and y of shape (M, D), works in float64 and returns a
float. Sets have a sampling error of their own: two sets drawn from one law are not at distance
zero (`wasserstein2_floor` says how far apart they are), and the unbiased MMD² and energy distance
of such sets scatter around zero, so they can be negative.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from cnf.data.arrays import as_numbers
from cnf.errors import expect_counts, expect_finite, expect_positive, optional
from cnf.matching.couplings import optimal
from cnf.metrics.estimate import Estimate
from cnf.metrics.metric import Score, metric
from cnf.random import draw, stream

_BLOCK = 4_000_000  # pairs held at once: 32 MB of float64, so large sets never need N·M memory


@metric(
    "samples",
    Score(
        "w2", "W2", "Exact 2-Wasserstein distance to true samples", note="{w2_points} pts",
        terminal="W2", contest="samples (W2)",
    ),
    points=1,
)  # fmt: skip
def wasserstein2(x: Tensor, y: Tensor) -> float:
    r"""Exact 2-Wasserstein distance of two empirical laws, in the units of the data.

    .. math:: W_2 = \Big(\min_{\pi\in\Pi(1/N,\,1/M)} \sum_{ij} \pi_{ij}\,\|x_i-y_j\|^2\Big)^{1/2}

    The network simplex of POT (Flamary et al., 2021, https://jmlr.org/papers/v22/20-451.html),
    the square root taken as in Tong et al. (2024), https://arxiv.org/abs/2302.00482; some papers
    print the square. For up to about 10,000 points (half a minute of one core, 4.5 GB):
    memory grows as N·M, time faster. On the CPU.

    Args:
        x: One set, shape (N, D).
        y: The other, shape (M, D).

    Raises:
        ValueError: the sets are empty, not finite, or of different D; or POT's answer is not known
            to be the optimum.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> wasserstein2(x, x + torch.tensor([3.0, 4.0]))
    5.0
    """
    return math.sqrt(_transport_cost("wasserstein2", x, y, power=2))


def wasserstein1(x: Tensor, y: Tensor) -> float:
    r"""Exact 1-Wasserstein distance of two empirical laws, in the units of the data.

    .. math:: W_1 = \min_{\pi\in\Pi(1/N,\,1/M)} \sum_{ij} \pi_{ij}\,\|x_i-y_j\|

    What papers on trajectories of cells print, such as Tong et al. (2020), TrajectoryNet,
    https://arxiv.org/abs/2002.04461; for the size of sets and the source see `wasserstein2`, which
    is never below it.

    Args:
        x: One set, shape (N, D).
        y: The other, shape (M, D).

    Raises:
        ValueError: the sets are empty, not finite, or of different D; or POT's answer is not known
            to be the optimum.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> wasserstein1(x, x + torch.tensor([3.0, 4.0]))
    5.0
    """
    return _transport_cost("wasserstein1", x, y, power=1)


def _transport_cost(who: str, x: Tensor, y: Tensor, power: int) -> float:
    """The least mean of a power of the distance that moves one set to the other."""
    x, y = (points.cpu() for points in _pair(who, x, y))
    cost = _distances(x, y).pow_(power).numpy()
    least, _ = optimal(who, optional("ot", "evaluation").emd2, cost)
    return max(float(least), 0.0)


def wasserstein2_floor(
    draw: Callable[[int, Generator | None], Tensor],
    n: int,
    generator: Generator | None = None,
    repeats: int = 1,
) -> Estimate:
    """W2 between two independent sets of n true samples: what a perfect model scores.

    It falls slowly with n (as n^(-1/D) for D > 4: Fournier and Guillin, 2015,
    https://arxiv.org/abs/1312.2128), so a W2 is read beside the floor of the same n.

    Args:
        draw: `draw(n, generator)` gives true samples, shape (n, D): a toy's `sample`, for one.
        n: Points in each of the two sets.
        generator: Source of all draws.
        repeats: Independent pairs of sets.

    Returns:
        Mean over the repeats and its standard error (NaN for one), in the units of the data.
    """
    expect_counts("wasserstein2_floor", n=n, repeats=repeats)
    floors = [wasserstein2(draw(n, generator), draw(n, generator)) for _ in range(repeats)]
    return Estimate.of(torch.tensor(floors, dtype=torch.float64))


def sliced_wasserstein2(
    x: Tensor, y: Tensor, projections: int = 1000, generator: Generator | None = None
) -> float:
    r"""Sliced 2-Wasserstein distance, in the units of the data.

    .. math:: SW_2^2 = E_{\theta\sim U(S^{D-1})}\,\int_0^1
        \big(F^{-1}_{\theta^\top x}(u) - F^{-1}_{\theta^\top y}(u)\big)^2\,du

    Exact along each direction for any N and M (`ot.sliced_wasserstein_distance` gives the same
    and takes 2.4 to 4 times as long); Monte Carlo over the directions, so the same
    generator gives comparable numbers. A shift s costs |s|/√D. Source: Bonneel et al. (2015),
    https://doi.org/10.1007/s10851-014-0506-3.

    Args:
        x: One set, shape (N, D).
        y: The other, shape (M, D).
        projections: Random directions.
        generator: Source of the directions.
    """
    x, y = _pair("sliced_wasserstein2", x, y)
    expect_counts("sliced_wasserstein2", projections=projections)
    directions = draw(torch.randn, (projections, x.shape[1]), generator, like=x)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    # Both quantile functions are constant between neighbors of the merged grid {i/N} ∪ {j/M},
    # here in units of 1/(N·M): whole numbers, so that a level which both grids share is one
    # point and not two a rounding error apart.
    n, m = len(x), len(y)
    levels = torch.cat([torch.arange(n) * m, torch.arange(m + 1) * n]).unique().to(x.device)
    start, widths = levels[:-1], levels.diff().to(x.dtype) / (n * m)
    total = 0.0
    for theta in directions.split(max(1, _BLOCK // len(levels))):
        along_x = (x @ theta.T).sort(dim=0).values[start // m]
        along_y = (y @ theta.T).sort(dim=0).values[start // n]
        total += (widths @ (along_x - along_y).square_()).sum().item()
    return math.sqrt(total / projections)


@metric(
    "samples",
    Score(
        "sliced_w2", "Sliced W2", "Of samples by the flow's own solver", note="{test_points} pts"
    ),
)
def sliced(true: Tensor, drawn: Tensor) -> float:
    """Sliced W2 over 200 directions, always the same, so that few of them compare flows well."""
    return sliced_wasserstein2(drawn, true, 200, generator=stream(0, "directions of sliced W2"))


@metric(
    "samples", Score("mmd", "MMD²", "Squared maximum mean discrepancy", note="unbiased"), points=2
)
def mmd(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
    biased: bool = False,
) -> float:
    r"""Squared maximum mean discrepancy with a sum of Gaussian kernels, without unit.

    .. math:: MMD^2 = E\,k(X,X') + E\,k(Y,Y') - 2E\,k(X,Y),\qquad
        k(a,b) = \sum_\sigma \exp\!\big(-\|a-b\|^2/2\sigma^2\big)

    By default the unbiased U-statistic (pairs of a point with itself left out), whose mean is 0
    for equal laws: it can be negative. Source: Gretton et al. (2012),
    https://jmlr.org/papers/v13/gretton12a.html. Kernels, their sum (no mean) and σ ∈ {.01, .1, 1,
    10, 100} are those of torchcfm's evaluation code, which prints the biased V-statistic:
    `biased=True` gives that number.

    Args:
        x: One set, shape (N, D), of at least two points unless biased.
        y: The other, shape (M, D), likewise.
        bandwidths: The σ, in the units of the data.
        biased: V-statistic, never negative, too large by at most K·(1/N + 1/M) for K kernels.
    """
    x, y = _pair("mmd", x, y)
    for sigma in bandwidths:
        expect_positive("mmd", bandwidth=sigma)

    def kernel(distance: Tensor) -> Tensor:
        exponent = distance.square().mul_(-0.5)
        return torch.stack([(exponent / sigma**2).exp_().sum() for sigma in bandwidths]).sum()

    return _discrepancy("mmd", kernel, x, y, biased)


@metric(
    "samples",
    Score("energy_distance", "Energy dist.", "Energy distance of samples", note="unbiased"),
    points=2,
)
def energy_distance(x: Tensor, y: Tensor, biased: bool = False) -> float:
    r"""Energy distance, in the units of the data (scipy's is the square root of it).

    .. math:: \mathcal E = 2E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|

    By default the unbiased U-statistic (pairs of a point with itself left out), whose mean is 0
    for equal laws: it can be negative. `biased=True` is the V-statistic, the distance of the two
    empirical laws, never negative. Source: Székely and Rizzo (2013),
    https://doi.org/10.1016/j.jspi.2013.03.018.

    Args:
        x: One set, shape (N, D), of at least two points unless biased.
        y: The other, shape (M, D), likewise.
        biased: V-statistic.
    """
    x, y = _pair("energy_distance", x, y)
    return -_discrepancy("energy_distance", torch.sum, x, y, biased)


@metric(
    "samples",
    Score("c2st", "C2ST", "A classifier telling samples from data; 0.5 is best", note="accuracy"),
    dims=200,  # its networks have 10 D units in each layer
)
def c2st(x: Tensor, y: Tensor, folds: int = 5, seed: int = 0, max_points: int = 2000) -> float:
    """Classifier two-sample test: held-out accuracy of telling x from y (0.5: it cannot).

    Lopez-Paz and Oquab (2017), https://arxiv.org/abs/1610.06545, with the classifier of sbibm
    (Lueckmann et al., 2021, https://arxiv.org/abs/2101.04653): two hidden layers of 10·D ReLU
    units, Adam, inputs z-scored by x. Unlike sbibm's, the classes are cut to equal size and the
    folds are stratified, so that 0.5 is chance whatever N and M.

    Args:
        x: The reference (its mean and scale standardize both), shape (N, D).
        y: The set to judge, shape (M, D).
        folds: Folds of the cross-validation.
        seed: Of the subsample, the folds and the classifier.
        max_points: At most so many random points of each class, to bound the time; accuracy grows
            with it for unequal laws, so compare numbers of the same size only. Its standard error
            is about 0.5/√(2·points).

    Raises:
        ValueError: The sets are empty, not finite or of different D, or smaller than the folds.
    """
    x, y = (points.cpu() for points in _pair("c2st", x, y))
    n = min(len(x), len(y), max_points)
    if not 2 <= folds <= n:
        raise ValueError(f"c2st: expected 2 ≤ folds ≤ points of each class, got {folds} and {n}")
    neural = optional("sklearn.neural_network", "evaluation")
    selection = optional("sklearn.model_selection", "evaluation")
    unconverged = optional("sklearn.exceptions", "evaluation").ConvergenceWarning

    scale = x.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)  # a constant column of x stays as it is
    shuffle = Generator().manual_seed(seed)  # x may be ordered, by mode for one
    sets = [
        ((s - x.mean(0)) / scale)[torch.randperm(len(s), generator=shuffle)[:n]] for s in (x, y)
    ]
    width = 10 * x.shape[1]
    classifier = neural.MLPClassifier((width, width), max_iter=1000, random_state=seed)
    splits = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A fit that is cut off still gives a valid accuracy: the test set is held out.
        warnings.simplefilter("ignore", unconverged)
        labels = torch.arange(2).repeat_interleave(n).numpy()
        scores = selection.cross_val_score(classifier, torch.cat(sets).numpy(), labels, cv=splits)
    return float(scores.mean())


def _pair(who: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on x's device, or the reason why they cannot be compared."""
    x, y = as_numbers(who, "x", x), as_numbers(who, "y", y)
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or 0 in value.shape:
            raise ValueError(
                f"{who}: expected {name} of shape (N, D) and not empty, got {tuple(value.shape)}"
            )
        expect_finite(who, name, value)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{who}: expected x and y of one D, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x.detach().double(), y.detach().to(x.device).double()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # cdist's faster route, |x|² + |y|² − 2xy, cancels for near points far from the origin
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _discrepancy(
    who: str, total: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, biased: bool
) -> float:
    """E f(X,X') + E f(Y,Y') − 2E f(X,Y); `total` sums f over a block of distances."""
    if not biased and min(len(x), len(y)) < 2:
        raise ValueError(
            f"{who}: expected 2 points or more in each set (or biased=True), "
            f"got {len(x)} and {len(y)}"
        )

    def over_pairs(a: Tensor, b: Tensor) -> float:
        blocks = a.split(max(1, _BLOCK // len(b)))
        return math.fsum(total(_distances(block, b)).item() for block in blocks)

    def within(a: Tensor) -> float:
        n = len(a)
        if biased:
            return over_pairs(a, a) / n**2
        return (over_pairs(a, a) - total(a.new_zeros(n)).item()) / (n * (n - 1))

    return within(x) + within(y) - 2 * over_pairs(x, y) / (len(x) * len(y))
