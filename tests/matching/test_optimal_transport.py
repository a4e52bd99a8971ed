"""Couplings by optimal transport, against brute force, scipy's assignment and POT's plans."""

import itertools
import warnings

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import cnf
from cnf.matching import COUPLINGS

F64 = torch.float64
minibatch, conditional = COUPLINGS["minibatch-ot"], COUPLINGS["conditional-ot"]
SHAPES = [(2,), (1,), (1, 3, 2)]


@pytest.fixture
def draw(generator):
    """(n, *event) → x0 and x1, not of the same law."""

    def make(n, *event):
        x0, x1 = (torch.randn(n, *event, generator=generator, dtype=F64) for _ in range(2))
        return x0, 0.7 * x1 + 1

    return make


def distances(x0, x1):
    """‖x0_i - x1_j‖², by the definition."""
    return (x0[:, None] - x1[None]).square().flatten(2).sum(-1).numpy()


def brute_force_optimum(cost):
    """The least Σ cost over all permutations, and the permutation."""
    n = len(cost)
    return min((cost[range(n), order].sum(), order) for order in itertools.permutations(range(n)))


def total_cost(cost, j):
    return cost[range(len(cost)), j.numpy()].sum()


def is_permutation(j):
    return j.dtype == torch.int64 and sorted(j.tolist()) == list(range(len(j)))


# Exact, without a context


@pytest.mark.parametrize("name", ["minibatch-ot", "conditional-ot"])
@pytest.mark.parametrize("event", SHAPES, ids=str)
def test_pairing_is_the_best_of_all_permutations(name, event, draw):
    for _ in range(5):
        x0, x1 = draw(6, *event)
        i, j, weight = COUPLINGS[name](x0, x1)
        least, order = brute_force_optimum(distances(x0, x1))
        assert i is None and weight is None and j.tolist() == list(order)
        assert total_cost(distances(x0, x1), j) == pytest.approx(least)


@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        (1e6, 0.0),
        (1e-6, 0.0),
        (1.0, 1e6),
        (1e-3, 1e3),
        (1e-8, 0.0),
        (1e-3, 1e6),
    ],
)
def test_units_and_origin_of_the_data_do_not_matter(scale, offset, draw):
    for _ in range(5):
        x0, x1 = draw(6, 2)
        _, order = brute_force_optimum(distances(x0, x1))
        j = minibatch(scale * x0 + offset, scale * x1 + offset).j
        assert j.tolist() == list(order)


@pytest.mark.parametrize("n", [40, 256])
def test_cost_equals_that_of_scipy_and_pot(n, draw):
    x0, x1 = draw(n, 2)
    cost = distances(x0, x1)
    j = minibatch(x0, x1).j
    assert is_permutation(j)
    assert total_cost(cost, j) == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-12)
    assert total_cost(cost, j) / n == pytest.approx(ot.emd2([], [], cost), rel=1e-12)
    assert total_cost(cost, j) < 0.7 * np.trace(cost)


def test_single_row_is_paired_with_itself(draw):
    x0, x1 = draw(1, 2)
    assert minibatch(x0, x1).j.tolist() == [0]
    for name in ("sinkhorn", "unbalanced", "partial"):
        assert COUPLINGS[name](x0, x1).j.tolist() == [0]


def test_single_row_with_a_context_is_paired_with_itself(draw):
    assert conditional(*draw(1, 2), torch.ones(1, 1)).j.tolist() == [0]


@pytest.mark.parametrize("name", ["minibatch-ot", "conditional-ot"])
def test_repeated_rows_are_used_once_each(name, draw):
    x0, x1 = draw(4, 2)
    x0, x1 = x0.repeat(3, 1), x1[[0] * 10 + [1, 2]]
    j = COUPLINGS[name](x0, x1).j
    assert is_permutation(j)
    cost = distances(x0, x1)
    assert total_cost(cost, j) == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-12)
    assert is_permutation(COUPLINGS[name](torch.ones(5, 2), torch.ones(5, 2)).j)


@pytest.mark.parametrize("name", ["minibatch-ot", "conditional-ot"])
def test_permutation_requires_equal_numbers_of_rows(name, draw):
    x0, x1 = draw(5, 2)
    with pytest.raises(ValueError, match=f"{name}: expected as many x0 as x1, got 5 and 4"):
        COUPLINGS[name](x0, x1[:4])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_pairs_do_not_depend_on_the_dtype(dtype, draw):
    x0, x1 = (value.float() for value in draw(50, 2))
    expected = minibatch(x0.double(), x1.double()).j
    assert torch.equal(minibatch(x0.to(dtype), x1.to(dtype)).j, expected)


def test_tensors_that_require_gradients_are_paired(draw):
    x0, x1 = (value.requires_grad_() for value in draw(6, 2))
    for name in COUPLINGS:
        options = {"reg": 1.0} if name in ("sinkhorn", "unbalanced") else {}
        found = COUPLINGS.build({"name": name, **options})(x0, x1)
        assert found.weight is None or not found.weight.requires_grad


# With a context


def test_minibatch_ot_warns_with_a_context_and_only_then(draw):
    x0, x1 = draw(6, 2)
    with pytest.warns(UserWarning, match='take coupling="conditional-ot"'):
        warned = minibatch(x0, x1, torch.ones(6, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = minibatch(x0, x1)
        conditional(x0, x1, torch.ones(6, 1))
    assert torch.equal(warned.j, silent.j)


@pytest.mark.parametrize("name", ["sinkhorn", "unbalanced", "partial"])
def test_other_couplings_that_ignore_the_context_warn(name, draw):
    options = {} if name == "partial" else {"reg": 1.0}  # with less POT has warnings of its own
    with pytest.warns(UserWarning, match="conditional"):
        COUPLINGS[name](*draw(6, 2), torch.ones(6, 1), **options)


@pytest.mark.parametrize("kind", ["number", "close numbers", "one-hot"])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_rows_are_permuted_optimally_within_each_label(kind, scale, draw):
    x0, x1 = (scale * value for value in draw(18, 2))
    labels = torch.arange(18) % 3
    x1 = x1 + 4 * scale * labels[:, None]  # which plain transport would love to exchange
    context = torch.eye(3)[labels] if kind == "one-hot" else labels[:, None].double()
    context = 1e-4 * context if kind == "close numbers" else context
    j, cost = conditional(x0, x1, context).j, distances(x0, x1)
    assert is_permutation(j) and torch.equal(labels[j], labels)
    for label in range(3):
        rows = (labels == label).nonzero()[:, 0]
        inside = cost[np.ix_(rows, rows)]
        assert cost[rows, j[rows]].sum() == pytest.approx(
            brute_force_optimum(inside)[0], rel=1e-12
        )
    assert (labels[minibatch(x0, x1).j] != labels).any()


def test_one_label_for_all_rows_is_minibatch_ot(draw):
    x0, x1 = draw(12, 2)
    context = torch.full((12, 2), 0.3)
    assert torch.equal(conditional(x0, x1, context).j, minibatch(x0, x1).j)


def test_weight_zero_or_no_context_is_minibatch_ot(draw, generator):
    x0, x1 = draw(30, 2)
    context = torch.randn(30, 2, generator=generator, dtype=F64)
    expected = minibatch(x0, x1).j
    assert torch.equal(conditional(x0, x1, context, weight=0.0).j, expected)
    assert torch.equal(conditional(x0, x1, None, weight=5.0).j, expected)
    assert not torch.equal(conditional(x0, x1, context).j, expected)


@pytest.mark.parametrize("weight", [0.1, 3.0, 1e4])
def test_weight_multiplies_squared_distances_between_contexts(weight, draw, generator):
    x0, x1 = draw(6, 2)
    context = torch.randn(6, 2, generator=generator, dtype=F64)
    cost = distances(x0, x1) + weight * distances(context, context)
    assert conditional(x0, x1, context, weight=weight).j.tolist() == list(
        brute_force_optimum(cost)[1]
    )


def preferred_share(cost, apart, candidates):
    """The weight above which `candidates` of all pairs are cheaper than the row's own: pair (i, j)
    is while w < (own_i - cost_ij)/apart_ij, so it is a quantile of those."""
    n = len(cost)
    ratio = (np.diag(cost)[:, None] - cost) / np.where(apart > 0, apart, 1)
    ratio = np.where(np.eye(n) > 0, -np.inf, ratio)  # a pair's own is not preferred to itself
    ordered = np.sort(ratio.ravel())[::-1]
    place = int(candidates * n * n)
    return 0.5 * (ordered[place - 1] + ordered[place])


@pytest.mark.parametrize("candidates", [0.01, 0.05])
@pytest.mark.parametrize("dim", [1, 8])
def test_weight_of_continuous_contexts_follows_the_share_of_candidates(
    dim, candidates, draw, generator
):
    x0, x1 = draw(128, 2)
    context = torch.rand(128, dim, generator=generator, dtype=F64)
    cost, apart = distances(x0, x1), distances(context, context)
    cost = cost + preferred_share(cost, apart, candidates) * apart
    j = conditional(x0, x1, context, candidates=candidates).j
    assert is_permutation(j) and (j != torch.arange(128)).float().mean() > 0.05
    least = cost[linear_sum_assignment(cost)].sum()
    assert total_cost(cost, j) == pytest.approx(least, rel=1e-6)
    more = conditional(x0, x1, context, candidates=4 * candidates).j
    assert (more != torch.arange(128)).sum() > (j != torch.arange(128)).sum()


def test_context_that_is_often_zero_is_treated_as_continuous(draw, generator):
    """90 of 200 rows share the value 0, and may be exchanged freely; the others by the weight."""
    x0, x1 = draw(200, 2)
    context = torch.rand(200, 1, generator=generator, dtype=F64) + 0.1
    context[:90] = 0
    cost, apart = distances(x0, x1), distances(context, context)
    ratio = (np.diag(cost)[:, None] - cost) / np.where(apart > 0, apart, np.inf)
    weight = np.quantile(np.where(apart > 0, ratio, -1e9), 0.99, method="higher")
    j = conditional(x0, x1, context).j
    assert is_permutation(j) and (j[:90] != torch.arange(90)).sum() > 45
    cost = cost + weight * apart
    assert total_cost(cost, j) == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-6)


@pytest.mark.parametrize("name", ["minibatch-ot", "conditional-ot"])
def test_failure_to_find_the_optimal_plan_names_the_coupling(name, draw):
    x0, x1 = draw(8, 2)
    x1[0] = torch.nan
    with pytest.raises(
        ValueError, match=f"^{name}: POT did not find the optimal plan: Problem unb"
    ):
        COUPLINGS[name](x0, x1)


def test_other_warnings_of_pot_are_not_errors(draw, monkeypatch):
    x0, x1 = draw(8, 2)
    expected, emd = minibatch(x0, x1).j.tolist(), ot.emd

    def chatty(*args, **kwargs):
        warnings.warn("numThreads is deprecated", UserWarning, stacklevel=1)
        return emd(*args, **kwargs)

    monkeypatch.setattr(ot, "emd", chatty)
    assert minibatch(x0, x1).j.tolist() == expected


def test_two_nearly_equal_contexts_do_not_change_the_other_pairs(draw, generator):
    x0, x1 = draw(128, 2)
    context = torch.randn(128, 8, generator=generator, dtype=F64)
    moved = []
    for gap in (0.01, 1e-8):
        near = torch.cat([context[:1] + gap, context[1:]])
        near[1] = context[0]
        j = conditional(x0, x1, near, candidates=0.05).j
        moved.append((j != torch.arange(128)).sum().item())
    assert moved[0] > 10 and abs(moved[0] - moved[1]) <= 4


def test_rows_without_a_context_are_permuted_among_themselves(draw):
    x0, x1 = draw(12, 2)
    context = torch.full((12, 1), float("nan"))
    context[:6] = 1.0
    j = conditional(x0, x1, context).j
    cost = distances(x0[6:], x1[6:])
    assert [k - 6 for k in j[6:].tolist()] == list(brute_force_optimum(cost)[1])


def test_a_missing_context_is_not_a_context_of_zero():
    """Each half's data lie where the other half's base is: exchanging them would be cheap."""
    side = 10 * (torch.arange(12) % 2).double()[:, None]
    context = torch.where(side == 0, 0.0, torch.nan)
    j = conditional(side, 10 - side, context).j
    assert torch.equal(j % 2, torch.arange(12) % 2)
    assert torch.equal(minibatch(side, 10 - side).j % 2, 1 - torch.arange(12) % 2)


# Entropic


def counts(coupling, x0, x1, generator, repeats, **options):
    """How often row i of x0 was paired with row j of x1, and the weights."""
    found = np.zeros((len(x0), len(x1)))
    for _ in range(repeats):
        i, j, weight = coupling(x0, x1, None, generator, **options)
        assert i is None and len(j) == len(x0)
        found[range(len(x0)), j.numpy()] += 1
    return found / repeats, weight


def assert_frequencies(found, expected, repeats):
    """Within 4.5 standard deviations, of a binomial's and one count."""
    spread = np.sqrt(expected * (1 - expected) / repeats) + 1 / repeats
    assert (np.abs(found - expected) < 4.5 * spread).all()


@pytest.mark.parametrize(("relative", "n"), [(True, (4, 4)), (True, (3, 5)), (False, (4, 4))])
def test_sinkhorn_draws_from_the_rows_of_pots_plan(relative, n, draw, generator):
    x0, x1 = draw(n[0], 2)[0], draw(n[1], 2)[1]
    cost = distances(x0, x1)
    reg = 0.5 * (cost.mean() if relative else 1.0)
    plan = ot.sinkhorn([], [], cost, reg)
    options = {"reg": 0.5, "relative": relative}
    found, weight = counts(COUPLINGS["sinkhorn"], x0, x1, generator, 300, **options)
    assert weight is None
    assert_frequencies(found, plan / plan.sum(1, keepdims=True), 300)
    other = ot.sinkhorn([], [], cost, 0.5 * (1.0 if relative else cost.mean()))
    assert np.abs(other - plan).max() * n[0] > 0.15  # so that `relative` is seen


@pytest.mark.parametrize("relative", [True, False])
def test_sinkhorn_passes_reg_in_units_of_the_mean_distance_to_pot(relative, draw, monkeypatch):
    x0, x1 = draw(8, 2)
    asked, sinkhorn = [], ot.sinkhorn
    monkeypatch.setattr(ot, "sinkhorn", lambda *a, **k: (asked.append(a), sinkhorn(*a, **k))[1])
    COUPLINGS["sinkhorn"](x0, x1, reg=0.4, relative=relative)
    _, _, cost, reg = asked[0]
    np.testing.assert_allclose(cost, distances(x0, x1), rtol=1e-12)
    assert reg == pytest.approx(0.4 * (distances(x0, x1).mean() if relative else 1.0))


@pytest.mark.parametrize(("ratio", "method"), [(490, "sinkhorn"), (510, "sinkhorn_log")])
def test_fast_sinkhorn_equals_that_of_the_log_domain(ratio, method, draw, monkeypatch):
    x0, x1 = draw(40, 2)
    found, sinkhorn = [], ot.sinkhorn
    monkeypatch.setattr(
        ot, "sinkhorn", lambda *a, **k: found.extend([sinkhorn(*a, **k), k["method"]]) or found[0]
    )
    cost = distances(x0, x1)
    reg = cost.max() / ratio
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so little entropy takes more iterations than POT has
        COUPLINGS["sinkhorn"](x0, x1, reg=reg, relative=False)
        plan = sinkhorn([], [], cost, reg, method="sinkhorn_log")
    assert found[1] == method
    np.testing.assert_allclose(found[0], plan, rtol=1e-6, atol=1e-12)


def test_sinkhorn_has_the_limits_of_independent_and_optimal_pairs(draw, generator):
    x0, x1 = draw(5, 2)
    found, _ = counts(COUPLINGS["sinkhorn"], x0, x1, generator, 400, reg=1e4)
    assert_frequencies(found, np.full((5, 5), 0.2), 400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so little has POT not come to its end
        j = COUPLINGS["sinkhorn"](x0, x1, None, generator, reg=1e-3).j
    assert torch.equal(j, minibatch(x0, x1).j)


def test_relative_entropy_is_in_units_of_the_mean_squared_distance(draw):
    x0, x1 = draw(6, 2)
    small, large = (
        COUPLINGS["sinkhorn"](
            scale * x0, scale * x1, None, torch.Generator().manual_seed(0), reg=0.5
        ).j
        for scale in (1.0, 1e3)
    )
    assert torch.equal(small, large)


@pytest.mark.parametrize("marginal", [0.1, 1.0])
def test_unbalanced_pairs_and_weights_follow_pots_plan(marginal, draw, generator):
    x0, x1 = draw(6, 2)
    x1[2] += 20  # an outlier, which loses its mass
    cost = distances(x0, x1)
    ends = np.full(6, 1 / 6)
    plan = ot.unbalanced.sinkhorn_unbalanced(ends, ends, cost / cost.mean(), 0.3, marginal)
    options = {"reg": 0.3, "marginal": marginal}
    found, weight = counts(COUPLINGS["unbalanced"], x0, x1, generator, 400, **options)
    rows = plan.sum(1)
    np.testing.assert_allclose(weight.numpy(), 6 * rows / rows.sum(), rtol=1e-6)
    assert_frequencies(found, plan / rows[:, None], 400)
    assert weight.mean().item() == pytest.approx(1.0) and weight.std() > 1e-3
    f = np.sin(x0[:, :1].numpy()) * x1[:, 1].numpy()  # some function of both
    expected = (plan * f).sum() / plan.sum()
    mean = (weight[:, None].numpy() * found * f).sum() / weight.sum().item()
    assert mean == pytest.approx(expected, abs=0.1 * np.abs(f[:, [0, 1, 3, 4, 5]]).max())
    assert found[:, 2].sum() < 0.3


@pytest.mark.parametrize("matched", [1, 2, 3, 4])
def test_partial_is_the_best_of_all_partial_matchings(matched, draw, generator):
    """At mass k/5 the cheapest plan matches k rows with k rows."""
    x0, x1 = draw(5, 2)
    cost = distances(x0, x1)
    least = min(
        sum(cost[i, j] for i, j in zip(rows, columns, strict=True))
        for rows in itertools.combinations(range(5), matched)
        for columns in itertools.permutations(range(5), matched)
    )
    _, j, weight = COUPLINGS["partial"](x0, x1, None, generator, mass=matched / 5)
    used = weight > 1e-9
    assert used.sum() == matched and (weight[~used].abs() < 1e-14).all()
    torch.testing.assert_close(weight[used], torch.full((matched,), 5 / matched, dtype=F64))
    assert cost[used.nonzero()[:, 0], j[used]].sum() == pytest.approx(least)
    assert len(j[used].unique()) == matched


def test_partial_gives_an_outlier_weight_zero(draw, generator):
    x0, x1 = draw(10, 2)
    x0[3] += 50
    _, _, weight = COUPLINGS["partial"](x0, x1, None, generator, mass=0.85)
    assert weight[3].abs() < 1e-14 and weight.mean().item() == pytest.approx(1.0)
    plan = ot.partial.partial_wasserstein(
        np.full(10, 0.1), np.full(10, 0.1), distances(x0, x1), m=0.85
    )
    np.testing.assert_allclose(weight.numpy(), plan.sum(1) * 10 / 0.85, atol=1e-9)


@pytest.mark.parametrize(
    "n",
    [
        10,
        64,
        49,
    ],
)
def test_partial_with_mass_one_is_the_optimal_permutation(n, draw, generator):
    x0, x1 = draw(n, 2)
    _, j, weight = COUPLINGS["partial"](x0, x1, None, generator, mass=1.0)
    assert torch.equal(j, minibatch(x0, x1).j)
    torch.testing.assert_close(weight, torch.ones(n, dtype=F64))


@pytest.mark.parametrize("name", ["sinkhorn", "unbalanced", "partial"])
def test_images_are_paired_like_flattened_vectors(name, draw):
    x0, x1 = draw(7, 1, 2, 3)
    found, expected = (
        COUPLINGS[name](a, b, None, torch.Generator().manual_seed(0))
        for a, b in ((x0, x1), (x0.flatten(1), x1.flatten(1)))
    )
    assert torch.equal(found.j, expected.j)


@pytest.mark.parametrize("name", ["sinkhorn", "unbalanced", "partial"])
def test_identical_points_are_paired_or_refused_with_a_message(name):
    if name == "partial":
        assert len(COUPLINGS[name](torch.ones(4, 2), torch.ones(4, 2)).j) == 4
        return
    with pytest.raises(ValueError, match="a finite plan, got one that is empty or NaN"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            COUPLINGS[name](torch.ones(4, 2), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sinkhorn", {"reg": 0.0}, "sinkhorn: expected reg > 0"),
        ("unbalanced", {"reg": -1.0}, "unbalanced: expected reg > 0"),
        ("unbalanced", {"marginal": 0.0}, "unbalanced: expected marginal > 0"),
        ("partial", {"mass": 0.0}, "partial: expected 0 < mass <= 1, got 0.0"),
        ("partial", {"mass": 1.5}, "partial: expected 0 < mass <= 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message, draw):
    with pytest.raises(ValueError, match=message):
        COUPLINGS[name](*draw(4, 2), **options)


# By name, and in flow matching


def test_coupling_is_built_from_a_name_and_options(draw):
    x0, x1 = draw(20, 2)
    context = torch.linspace(0, 1, 20, dtype=F64)[:, None]
    named = COUPLINGS.build({"name": "conditional-ot", "weight": 3.0})(x0, x1, context, None)
    assert torch.equal(named.j, conditional(x0, x1, context, weight=3.0).j)
    assert COUPLINGS.build(minibatch) is minibatch
    with pytest.raises(ValueError, match="unknown coupling 'minibatchot'.*'minibatch-ot'"):
        COUPLINGS.build("minibatchot")


def test_a_misspelt_option_is_refused_before_training():
    with pytest.raises((TypeError, ValueError), match="regularization"):
        cnf.FlowMatching(coupling={"name": "sinkhorn", "regularization": 0.1})


def test_flow_matching_keeps_x0_and_permutes_data_with_context(small_flow, draw):
    flow = small_flow("cnf", context=1)
    x, _ = draw(16, 2)
    context = torch.arange(16, dtype=F64)[:, None] % 2
    seed = torch.Generator().manual_seed
    plain = cnf.FlowMatching().prepare(flow, cnf.Batch(x, context), seed(0))
    paired = cnf.FlowMatching(coupling="conditional-ot").prepare(
        flow, cnf.Batch(x, context), seed(0)
    )
    assert torch.equal(paired.x0, plain.x0)
    rows = [(plain.x1 == row).all(1).nonzero()[0, 0].item() for row in paired.x1]
    assert sorted(rows) == list(range(16)) and rows != list(range(16))
    assert torch.equal(paired.context, plain.context[rows])
    assert torch.equal(paired.context, plain.context)  # exchanged among equals only
    lengths = [(batch.x1 - batch.x0).square().sum() for batch in (paired, plain)]
    assert lengths[0] < lengths[1]


def test_weights_of_partial_pairs_weight_the_loss(small_flow, draw):
    flow = small_flow("cnf")
    objective = cnf.FlowMatching(coupling={"name": "partial", "mass": 0.5})
    batch = objective.prepare(flow, cnf.Batch(draw(8, 2)[1]), torch.Generator().manual_seed(0))
    used = batch.weight > 0
    assert used.sum() == 4
    error = flow.field(batch.t, batch.x0 + batch.t[:, None] * (batch.x1 - batch.x0))
    expected = (error - (batch.x1 - batch.x0)).square().sum(1)[used].mean()
    torch.testing.assert_close(objective(flow, batch).value, expected)
