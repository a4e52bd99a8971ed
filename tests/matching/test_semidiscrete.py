"""The semi-discrete coupling against closed forms, brute force and POT's exact plans."""

import pytest
import torch
from scipy.stats import chi2, ks_2samp, norm

import cnf
from cnf.matching import COUPLINGS, SemiDiscrete, semidiscrete
from cnf.matching.semidiscrete import _approximate_assignment, _evenly_spaced, _exact_assignment
from cnf.metrics.distances import wasserstein2

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*event, dtype=torch.float32):
    """Base samples: (n, generator) → (n, *event)."""
    return lambda n, generator=None: torch.randn(n, *event, generator=generator, dtype=dtype)


def masses(plan, x1, draw, n=100_000):
    """Each row's mass of the base, times M: 1 for all rows of an exact plan."""
    j = plan(draw(n, seeded(9)), x1).j
    return torch.bincount(j, minlength=len(x1)) * len(x1) / n


def test_two_points_divide_the_plane_in_the_middle_of_the_base():
    """Whatever the points, equal masses of N(0, I) lie on both sides of a line through 0."""
    x1 = torch.tensor([[1.0, 0.0], [7.0, 0.0]])
    plan = SemiDiscrete().fit(x1, normal(2), generator=seeded())
    x0 = normal(2)(10_000, seeded(1))
    clear = x0[:, 0].abs() > 0.02
    assert torch.equal(plan(x0, x1).j[clear], (x0[clear, 0] > 0).long())


def test_base_off_center_is_divided_at_its_mean():
    x1, spread = torch.tensor([[1.0, 0.0], [7.0, 0.0]]), normal(2)
    plan = SemiDiscrete(steps=5).fit(x1, lambda n, g: 5 + spread(n, g), generator=seeded())
    x0 = 5 + spread(2_000, seeded(1))
    clear = (x0[:, 0] - 5).abs() > 0.2  # of five steps
    assert torch.equal(plan(x0, x1).j[clear], (x0[clear, 0] > 5).long())


def test_in_one_dimension_the_plan_is_the_monotone_map(generator):
    x1 = torch.rand(50, 1, generator=generator, dtype=F64) ** 2
    plan = SemiDiscrete().fit(x1, normal(1, dtype=F64), generator=seeded())
    x0 = normal(1, dtype=F64)(2_000, seeded(1))
    quantile = 50 * torch.from_numpy(norm.cdf(x0.numpy()))[:, 0]
    clear = (quantile - quantile.round()).abs() > 0.1  # of a cell: of a million base samples
    rank = x1[:, 0].argsort().argsort()[plan(x0, x1).j]
    assert torch.equal(rank[clear], quantile[clear].long())


@pytest.mark.parametrize(("event", "rows"), [((2,), 400), ((3,), 300), ((4,), 300), ((2, 3), 200)])
def test_every_row_is_assigned_an_equal_mass_of_the_base(event, rows, generator):
    spread = torch.linspace(0.5, 2, rows).reshape(-1, *[1] * len(event))
    x1 = torch.randn(rows, *event, generator=generator) * spread + 3
    plan = SemiDiscrete().fit(x1, normal(*event), generator=seeded())
    share = masses(plan, x1, normal(*event))
    noise = (rows / 100_000) ** 0.5  # of so many samples: 0.06
    assert (share - 1).square().mean().sqrt() < 0.15 + noise
    halves = share[: rows // 2].mean(), share[rows // 2 :].mean()
    assert max(halves) < 1.02


def imbalance(plan, x1, draw, n):
    """RMS error of the rows' shares of the base, in parts of an equal share."""
    return (masses(plan, x1, draw, n) - 1).square().mean().sqrt()


@pytest.mark.parametrize("rows", [2, 5, 20, 50])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_few_rows_are_assigned_equal_masses(rows, seed):
    """Initialized from as few base samples as rows, shares of 5 rows were 0.3 to 0.5 off."""
    x1 = torch.randn(rows, 2, generator=seeded(seed))
    plan = SemiDiscrete().fit(x1, normal(2), generator=seeded(seed))
    assert imbalance(plan, x1, normal(2), 300_000) < 0.03


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(lambda x: x * torch.tensor([100.0, 0.01]), id="columns of unlike scale"),
        pytest.param(lambda x: x + 50 * torch.eye(len(x), 2), id="outliers"),
        pytest.param(lambda x: x + 9 * x.sign(), id="clusters"),
    ],
)
def test_few_rows_of_any_shape_are_assigned_equal_masses(spread):
    for rows in (2, 5):
        x1 = spread(torch.randn(rows, 2, generator=seeded(4)))
        plan = SemiDiscrete().fit(x1, normal(2), generator=seeded(4))
        assert imbalance(plan, x1, normal(2), 300_000) < 0.03


def test_thousand_rows_are_assigned_nearly_equal_masses():
    x1 = torch.randn(1_000, 2, generator=seeded(3))
    plan = SemiDiscrete().fit(x1, normal(2), generator=seeded(3))
    assert imbalance(plan, x1, normal(2), 1_000_000) < 0.1


def test_few_rows_of_each_label_are_assigned_equal_masses():
    label = torch.arange(10).repeat_interleave(3)
    context = torch.nn.functional.one_hot(label).float()
    x1 = torch.randn(30, 2, generator=seeded(3)) + label[:, None]
    plan = SemiDiscrete().fit(x1, normal(2), context, seeded(3))
    x0 = normal(2)(100_000, seeded(9))
    for k in range(10):
        j = plan(x0, x1, context[3 * k].expand(len(x0), -1)).j
        share = torch.bincount(j - 3 * k, minlength=3) * 3 / len(x0)
        assert (share - 1).square().mean().sqrt() < 0.03


def test_subset_of_sorted_rows_is_evenly_spaced():
    cpu = torch.device("cpu")
    assert _evenly_spaced(40, 4, cpu).tolist() == [0, 10, 20, 30]
    assert torch.bincount(_evenly_spaced(3, 9, cpu)).tolist() == [3, 3, 3]


def test_nearest_neighbors_do_not_have_equal_masses(generator):
    x1 = torch.randn(400, 2, generator=generator) * torch.linspace(0.5, 2, 400)[:, None] + 3
    nearest = torch.cdist(normal(2)(100_000, seeded(9)), x1).argmin(1)
    share = torch.bincount(nearest, minlength=400) / 250
    assert (share - 1).square().mean().sqrt() > 1


def test_cost_equals_that_of_the_exact_plan_between_2000_points():
    toy = cnf.data.toy("8gaussians-r5")
    x1 = toy.sample(2_000, seeded())
    plan = SemiDiscrete().fit(x1, normal(2), generator=seeded())
    x0 = normal(2)(200_000, seeded(1))
    cost = (x0 - x1[plan(x0, x1).j]).square().sum(1).mean().item()
    exact = [wasserstein2(normal(2)(2_000, seeded(k)), x1) ** 2 for k in (2, 3, 4)]
    independent = (x0 - x1[torch.randint(2_000, (200_000,))]).square().sum(1).mean().item()
    # the exact plans are between samples: slightly more, as the base is empirical
    assert cost == pytest.approx(sum(exact) / 3, rel=0.02) and independent > 1.5 * cost


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 6])
def test_exact_assignment_minimizes_the_cost_by_tree_and_by_products(dim, generator):
    y = torch.randn(200, dim, generator=generator, dtype=F64)
    p = 0.3 * torch.randn(200, generator=generator, dtype=F64)
    x = 2 * torch.randn(500, dim, generator=generator, dtype=F64)
    expected = ((x[:, None] - y).square().sum(-1) - (2 * p + y.square().sum(1))).argmin(1)
    assert torch.equal(_exact_assignment(y, p)(x), expected)


def test_approximate_assignment_agrees_with_the_exact_one_and_omits_cells_without_mass(
    generator, monkeypatch
):
    monkeypatch.setattr(semidiscrete, "CANDIDATES", (1, 8))  # one cell is not enough
    y = torch.randn(300, 2, generator=generator, dtype=F64)
    p = -0.5 * y.square().sum(1)  # Voronoi cells
    p[0] = -100.0

    def sample(n):
        return torch.randn(n, 2, generator=generator, dtype=F64)

    x = sample(200_000)
    j = _exact_assignment(y, p)(x)
    mass = torch.bincount(j, minlength=300).to(F64)
    sums = torch.zeros_like(y).index_add_(0, j, x)
    assign = _approximate_assignment(y, p, mass, sums, sample)
    x = sample(10_000)
    agreed = assign(x) == _exact_assignment(y, p)(x)
    assert agreed.double().mean() > 0.99 and (assign(x) != 0).all()
    assert assign.__qualname__.startswith("_approximate")  # it did not fall back to all cells


def test_pairs_keep_labels_and_each_label_has_the_whole_base(generator):
    label = torch.arange(300) % 3
    x1 = torch.randn(300, 2, generator=generator) + 6 * label[:, None]
    context = torch.nn.functional.one_hot(label).float()
    plan = SemiDiscrete(steps=100).fit(x1, normal(2), context, seeded())
    wanted = torch.randint(3, (30_000,), generator=generator)
    x0 = normal(2)(30_000, seeded(1))
    j = plan(x0, x1, torch.nn.functional.one_hot(wanted).float()).j
    assert torch.equal(label[j], wanted)
    share = torch.bincount(j, minlength=300) / 100
    assert share.min() > 0.5 and share.max() < 1.6  # of 100 samples a row


def test_rows_without_a_context_form_a_group(generator):
    x1, context = torch.randn(40, 2, generator=generator), torch.ones(40, 1)
    context[::2] = torch.nan
    plan = SemiDiscrete(steps=20).fit(x1, normal(2), context, seeded())
    j = plan(normal(2)(40, seeded()), x1, context).j
    assert torch.equal(j % 2, torch.arange(40) % 2)


def test_continuous_contexts_are_refused(generator):
    x1, context = torch.randn(40, 2, generator=generator), torch.rand(40, 1, generator=generator)
    with pytest.raises(ValueError, match='got 40 different ones .* coupling="conditional-ot"'):
        SemiDiscrete().fit(x1, normal(2), context)
    plan = SemiDiscrete(steps=5).fit(x1, normal(2), torch.ones(40, 1), seeded())
    with pytest.raises(ValueError, match="expected the labels .* none of them"):
        plan(x1[:2], x1, torch.zeros(2, 1))
    with pytest.raises(
        ValueError, match="expected a context, as the coupling was fitted, got none"
    ):
        plan(x1[:2], x1)
    with pytest.raises(ValueError, match="the 40 rows that it was fitted to, got 39"):
        plan(x1[:2], x1[:39], torch.ones(2, 1))


@pytest.mark.parametrize("rows", [torch.ones(1, 2), torch.ones(30, 2), 1e4 + torch.rand(30, 2)])
def test_few_or_equal_or_distant_rows_are_paired(rows):
    plan = SemiDiscrete(steps=10).fit(rows, normal(2), generator=seeded())
    j = plan(normal(2)(100, seeded()), rows).j
    assert j.min() >= 0 and j.max() < len(rows)


def test_the_same_generator_gives_the_same_plan(generator):
    x1, x0 = torch.randn(100, 2, generator=generator), normal(2)(1_000, seeded(1))
    before = torch.get_rng_state()
    first, again = (SemiDiscrete(20).fit(x1, normal(2), generator=seeded()) for _ in range(2))
    assert torch.equal(first(x0, x1).j, again(x0, x1).j)
    assert torch.equal(torch.get_rng_state(), before)


def test_unfitted_coupling_is_minibatch_ot(generator):
    x0, x1 = (torch.randn(20, 2, generator=generator) for _ in range(2))
    expected = COUPLINGS["minibatch-ot"](x0, x1).j
    assert torch.equal(COUPLINGS.build("semidiscrete")(x0, x1).j, expected)
    context = torch.arange(20)[:, None] % 2
    expected = COUPLINGS["conditional-ot"](x0, x1, context).j
    assert torch.equal(COUPLINGS.build("semidiscrete")(x0, x1, context).j, expected)


def test_rows_of_a_cell_are_drawn_equally_often_and_all_rows_by_the_law_of_the_data():
    toy = cnf.data.toy("pinwheel")
    rows, fresh = toy.sample(20_000, seeded()), toy.sample(100_000, seeded(2))
    plan = SemiDiscrete(cells=200).fit(rows, normal(2), generator=seeded())
    cells, _ = plan.groups[0]
    assert len(cells.sizes) == 200 and torch.equal(cells.rows.sort().values, torch.arange(20_000))
    j = plan(normal(2)(400_000, seeded(1)), rows, None, seeded(3)).j
    counts = torch.bincount(j, minlength=20_000)[cells.rows].double()
    share = torch.stack([part.mean() for part in counts.split(cells.sizes.tolist())]) / 20
    assert (share - 1).square().mean().sqrt() < 0.08  # masses are proportional to sizes
    assert cells.sizes.double().std() > 30  # which differ: equal masses would not do
    expected = 20 * share.repeat_interleave(cells.sizes)
    statistic = ((counts - expected).square() / expected).sum()
    low, high = chi2(20_000 - 200).ppf([1e-4, 1 - 1e-4])
    assert low < statistic < high
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]):
        assert ks_2samp(rows[j] @ direction, fresh @ direction).statistic < 0.015


def test_cost_of_cells_is_near_that_of_the_exact_plan_and_falls_with_their_number():
    toy = cnf.data.toy("8gaussians-r5")
    x1, x0 = toy.sample(2_000, seeded()), normal(2)(100_000, seeded(1))
    costs = []
    for cells in (20, 400):
        plan = SemiDiscrete(cells=cells).fit(x1, normal(2), generator=seeded())
        j = plan(x0, x1, None, seeded(3)).j
        costs.append((x0 - x1[j]).square().sum(1).mean().item())
    exact = [wasserstein2(normal(2)(2_000, seeded(k)), x1) ** 2 for k in (2, 3, 4)]
    assert costs[1] == pytest.approx(sum(exact) / 3, rel=0.02)
    assert costs[0] > 1.02 * costs[1]


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_cells_of_each_label_have_its_rows_alone(dim, generator):
    label = torch.arange(600) % 3
    x1 = torch.randn(600, dim, generator=generator) + label[:, None]
    context = torch.nn.functional.one_hot(label).float()
    plan = SemiDiscrete(steps=100, cells=20).fit(x1, normal(dim), context, seeded())
    assert [len(cells.sizes) for cells, _ in plan.groups] == [20 if dim > 1 else 200] * 3
    wanted = torch.randint(3, (60_000,), generator=generator)
    draws = normal(dim)(60_000, seeded(1))
    j = plan(draws, x1, torch.nn.functional.one_hot(wanted).float(), seeded(3)).j
    assert torch.equal(label[j], wanted)
    share = torch.bincount(j, minlength=600) / 100
    assert share.min() > 0 and (share - 1).square().mean().sqrt() < 0.25  # noise: 0.1


def test_pairs_of_cells_follow_the_generator_and_those_of_single_rows_need_none(generator):
    x1, x0 = torch.randn(300, 2, generator=generator), normal(2)(1_000, seeded(1))
    several = SemiDiscrete(20, cells=30).fit(x1, normal(2), generator=seeded())
    first, again, other = (several(x0, x1, None, seeded(k)).j for k in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = seeded(3)
    SemiDiscrete(20, cells=300).fit(x1, normal(2), generator=seeded())(x0, x1, None, drawn)
    assert torch.equal(drawn.get_state(), seeded(3).get_state())


def test_equal_rows_make_fewer_cells(generator):
    x1 = torch.randn(5, 2, generator=generator).repeat(20, 1)
    plan = SemiDiscrete(steps=20, cells=50).fit(x1, normal(2), generator=seeded())
    assert plan.groups[0][0].sizes.tolist() == [20] * 5
    counts = torch.bincount(plan(normal(2)(20_000, seeded(1)), x1, None, seeded()).j)
    assert len(counts) == 100 and counts.min() > 0


def test_no_rows_and_contexts_of_another_length_are_refused():
    with pytest.raises(ValueError, match="semidiscrete: expected one row of x1 or more, got 0"):
        SemiDiscrete().fit(torch.empty(0, 2), normal(2))
    with pytest.raises(ValueError, match="a context for each of 4 rows, got 3"):
        SemiDiscrete().fit(torch.ones(4, 2), normal(2), torch.ones(3, 1))


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="SemiDiscrete: expected steps > 0"):
        SemiDiscrete(steps=0)
    with pytest.raises(ValueError, match="SemiDiscrete: expected cells > 0"):
        SemiDiscrete(cells=0)
    with pytest.raises(
        ValueError, match="semidiscrete: unknown option 'row'; known: steps, rows, cells"
    ):
        cnf.FlowMatching(coupling={"name": "semidiscrete", "row": 3})
