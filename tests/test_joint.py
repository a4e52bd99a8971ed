"""Several objectives at once."""

import pytest
import torch

import cnf
from cnf import Batch, FlowMatching, MaximumLikelihood
from cnf.matching import Pairing
from cnf.objectives import OBJECTIVES, Joint

F64 = torch.float64


@pytest.fixture
def x(generator):
    return torch.randn(6, 2, generator=generator, dtype=F64) * 1.5 + 0.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_loss_is_the_weighted_sum_over_the_same_draws(small_flow, x):
    flow, joint = small_flow("rnode"), Joint(weights=(0.7, 0.2))
    batch = joint.prepare(flow, Batch(x), seeded())
    pairs, rows = batch.terms
    assert rows.probe is not None
    loss = joint(flow, batch)
    parts = FlowMatching()(flow, pairs), MaximumLikelihood()(flow, rows)
    torch.testing.assert_close(loss.value, 0.7 * parts[0].value + 0.2 * parts[1].value)
    assert set(loss.metrics) == {"fm", "nll", "kinetic", "jacobian"}


def test_gradient_is_the_weighted_sum(small_flow, x):
    flow, slopes = small_flow("cnf"), []
    both = Joint().prepare(flow, Batch(x), seeded())
    objectives = (FlowMatching(), MaximumLikelihood(), Joint(weights=(2.0, 0.5)))
    for objective, batch in zip(objectives, (*both.terms, both), strict=True):
        weights = list(objective.parameters(flow))
        slopes.append(torch.autograd.grad(objective(flow, batch).value, weights))
    for matching, likelihood, joint in zip(*slopes, strict=True):
        torch.testing.assert_close(joint, 2.0 * matching + 0.5 * likelihood, rtol=1e-6, atol=1e-9)


def test_each_parameter_is_listed_once(small_flow):
    flow = small_flow("cnf")
    assert len(list(Joint().parameters(flow))) == len(list(flow.parameters()))


def test_terms_are_built_by_name_and_the_lowest_learning_rate_is_used(small_flow):
    terms = ({"name": "flow-matching", "times": "skewed"}, {"name": "maximum-likelihood"})
    joint = Joint(terms, [1.0, 0.3])
    assert joint.terms == (FlowMatching(times="skewed"), MaximumLikelihood())
    assert joint.learning_rate(small_flow("cnf")) == 2e-3 and joint.needs_data
    assert joint.learning_rate(small_flow("otflow")) == 6e-3  # its likelihood's is 0.1


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.1, 0.1)])
def test_number_of_weights_must_equal_number_of_terms(weights):
    with pytest.raises(ValueError, match="Joint: expected a weight for each term, got 2 terms"):
        Joint(weights=weights)


def test_weights_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="Joint: expected weights > 0, got 0"):
        Joint(weights=(1.0, 0.0))


def test_saved_config_describes_every_term(small_flow, tmp_path):
    yaml = pytest.importorskip("yaml")
    joint = Joint(
        (
            FlowMatching(path={"name": "bridge", "sigma": 0.5}, coupling={"name": "partial"}),
            MaximumLikelihood(cnf.Hutchinson(2), solver={"method": "rk4", "steps": 2}),
        ),
        (1.0, 0.2),
    )
    config = cnf.TrainConfig(steps=2, batch_size=16, progress=False, folder=tmp_path / "run")
    cnf.fit(small_flow("cnf"), joint, torch.randn(50, 2), config)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        OBJECTIVES.build({"name": written["objective"], **written["objective_options"]}) == joint
    )


def test_terms_of_the_same_type_make_independent_draws(small_flow, x):
    flow, early, late = small_flow("cnf"), FlowMatching(), FlowMatching(times="skewed")
    joint, generator = Joint((early, late), (0.3, 0.6)), seeded()
    one, other = (term.prepare(flow, Batch(x), generator) for term in (early, late))
    assert not (one.x0 == other.x0).any() and not (one.t == other.t).any()
    parts = early(flow, one), late(flow, other)
    loss = joint(flow, Batch(x), seeded())
    torch.testing.assert_close(loss.value, 0.3 * parts[0].value + 0.6 * parts[1].value)
    assert [loss.metrics[name] for name in ("fm", "fm_2")] == [part.value for part in parts]


def test_likelihood_term_uses_rows_that_the_coupling_leaves_out(small_flow, x):
    def first_row(x0, x1, context, generator):
        return Pairing(None, torch.zeros(len(x1), dtype=torch.long))

    joint, flow = Joint((FlowMatching(coupling=first_row), MaximumLikelihood())), small_flow("cnf")
    nll = joint(flow, Batch(x), seeded()).metrics["nll"]
    torch.testing.assert_close(nll, -flow.log_prob(x).mean().detach())


def test_weighted_terms_are_means_over_processes(small_flow, x):
    flow, weight = small_flow("cnf"), torch.tensor([1.0, 1, 0, 5, 5, 5], dtype=F64)
    joint = Joint((FlowMatching(coupling="minibatch-ot"), MaximumLikelihood()))
    batch = joint.prepare(flow, Batch(x, weight=weight), seeded())
    halves = [batch.shared(rank, 2) for rank in (0, 1)]
    value = sum(share * joint(flow, half).value for half, share in halves) / 2
    torch.testing.assert_close(value, joint(flow, batch).value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("weight", [None, torch.arange(6.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "objective",
    [FlowMatching(), MaximumLikelihood("hutchinson", {"kinetic": 0.3, "jacobian": 0.2}), Joint()],
    ids=str,
)
def test_loss_is_the_mean_of_losses_of_single_rows(objective, weight, small_flow, x):
    flow = small_flow("cnf")
    batch = objective.prepare(flow, Batch(x, weight=weight), seeded())
    rows, weight = objective.per_row(flow, batch), torch.ones(6) if weight is None else weight
    assert rows.shape == (6,)
    expected = objective(flow, batch).value
    torch.testing.assert_close((rows * weight).sum() / weight.sum(), expected, rtol=0, atol=1e-7)
    assert torch.equal(rows, objective.per_row(flow, Batch(x), seeded())) or weight[0] == 0


def test_energy_and_examples_train_together_without_a_warning():
    """Data that reverse KL does not use are another term's: warnings are errors here."""
    flow = cnf.models.realnvp(2, hidden=(4,), layers=2)
    target = torch.distributions.MultivariateNormal(torch.ones(2), torch.eye(2))
    joint = Joint((MaximumLikelihood(), cnf.ReverseKL(target)), (1.0, 0.5))
    config = cnf.TrainConfig(steps=2, batch_size=16, progress=False, validations=0)
    assert set(cnf.fit(flow, joint, torch.randn(64, 2), config).records[-1]) >= {"nll", "elbo"}


def test_parts_of_parts_add_up_to_the_whole():
    """As where each of two processes adds up its gradient over two parts."""
    torch.manual_seed(0)
    flow, x = cnf.models.cnf(2, hidden=(4,)).double(), torch.randn(7, 2).double()
    fixed = MaximumLikelihood(solver=cnf.Solver("rk4", steps=2))  # adaptive steps see all rows
    joint = Joint(terms=(FlowMatching(), fixed))
    rows = joint.prepare(flow, Batch(x, weight=torch.arange(1.0, 8.0).double()))
    total = 0.0
    for process in (0, 1):
        own, share = rows.shared(process, 2)
        for part in (0, 1):
            mine, weight = own.shared(part, 2)
            total += share * weight * joint(flow, mine).value.item() / 4
    assert total == pytest.approx(joint(flow, rows).value.item(), rel=1e-12)
