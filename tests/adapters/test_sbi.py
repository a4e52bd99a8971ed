"""sbi trains, samples, scores and checks flows of this library as its own estimators."""

import pickle

import pytest
import torch
from torch.distributions import MultivariateNormal

import cnf

pytest.importorskip("sbi")

from sbi.inference import NLE, NPE, DirectPosterior  # noqa: E402

from cnf.adapters.sbi import (  # noqa: E402
    FlowEstimator,
    likelihood_estimator,
    posterior_estimator,
)

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
NOISE = 0.5
OBSERVED = torch.tensor([[1.0, -0.5]])
EXACT = MultivariateNormal(OBSERVED[0] / (1 + NOISE**2), torch.eye(2) / (1 + 1 / NOISE**2))
HIDDEN = {"hidden": (32, 32), "layers": 2}
FIELD = {"hidden": (32, 32)}

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs:UserWarning")


def simulated(count):
    theta = PRIOR.sample((count,))
    return theta, theta + NOISE * torch.randn(count, 2)


def kl_from_exact(posterior):
    """KL(exact ‖ posterior) by 2,000 draws, in nats."""
    theta = EXACT.sample((2_000,))
    return (EXACT.log_prob(theta) - posterior.log_prob(theta, x=OBSERVED)).mean().item()


@pytest.fixture(autouse=True)
def _begin(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # sbi writes its logs there


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, objective, options, lr",
    [("nsf", "maximum-likelihood", HIDDEN, 2e-3), ("cnf", cnf.FlowMatching(), FIELD, 6e-3)],
    ids=["nsf", "flow matching"],
)
def test_npe_learns_the_exact_posterior(model, objective, options, lr):
    inference = NPE(
        PRIOR, posterior_estimator(model, objective, **options), show_progress_bars=False
    )
    inference.append_simulations(*simulated(2_000))
    inference.train(max_num_epochs=30, learning_rate=lr, training_batch_size=200)
    posterior = inference.build_posterior()
    assert -0.01 < kl_from_exact(posterior) < 0.1
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(posterior.log_prob(OBSERVED, OBSERVED), again.log_prob(OBSERVED, OBSERVED))


@pytest.mark.slow
def test_nle_learns_the_exact_likelihood():
    inference = NLE(PRIOR, likelihood_estimator("nsf", **HIDDEN), show_progress_bars=False)
    inference.append_simulations(*simulated(2_000))
    estimator = inference.train(max_num_epochs=30, learning_rate=2e-3)
    theta, x = simulated(2_000)
    exact = MultivariateNormal(theta, NOISE**2 * torch.eye(2)).log_prob(x)
    with torch.no_grad():
        assert -0.02 < (exact - estimator.log_prob(x, theta)[0]).mean() < 0.1


def test_embedding_sees_standardized_pictures_and_is_trained():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    inference = NPE(
        PRIOR, posterior_estimator("nsf", embedding=net, **HIDDEN), show_progress_bars=False
    )
    theta = PRIOR.sample((400,))
    x = 1e4 + 10 * theta.repeat(1, 6).view(-1, 3, 4)
    before = net[1].weight.clone()
    inference.append_simulations(theta, x)
    estimator = inference.train(max_num_epochs=1)
    assert not torch.equal(before, estimator.embedding_net[1][1].weight)
    assert estimator.embedding_net[0](x).std() < 1.5


def test_flow_trained_by_fit_is_a_posterior_of_sbi():
    flow = cnf.models.nsf(2, context=2, **HIDDEN)
    theta, x = simulated(2_000)
    config = cnf.TrainConfig(steps=300, batch_size=200, progress=False)
    cnf.fit(flow, cnf.MaximumLikelihood(), theta, config, context=x)
    posterior = DirectPosterior(FlowEstimator(flow), PRIOR)
    assert -0.01 < kl_from_exact(posterior) < 0.15
    assert posterior.sample_batched((5,), x[:3], show_progress_bars=False).shape == (5, 3, 2)


def test_shapes_broadcast_as_sbi_has_them():
    estimator = FlowEstimator(cnf.models.nsf(2, context=3, **HIDDEN))
    x, c = torch.randn(5, 4, 2), torch.randn(4, 3)
    whole = estimator.log_prob(x, c)
    assert whole.shape == (5, 4)
    assert torch.allclose(whole, estimator.log_prob(x, c.expand(5, 4, 3)))
    assert torch.allclose(whole[:1], estimator.log_prob(x[0], c))
    assert estimator.log_prob(x[:, :1], c).shape == (5, 4)
    samples, log_prob = estimator.sample_and_log_prob(torch.Size([6]), c)
    assert samples.shape == estimator.sample(torch.Size([6]), c).shape == (6, 4, 2)
    assert torch.allclose(log_prob, estimator.log_prob(samples, c), atol=1e-4)


def test_data_of_other_scales_are_standardized():
    theta, x = simulated(500)
    estimator = posterior_estimator("nsf", **HIDDEN)(1e4 + 10 * theta, 1e-4 * x)
    z = estimator.net.encode(1e4 + 10 * theta, 1e-4 * x)
    assert z.std() < 3 and estimator.net.context_preprocess.fitted


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="without a context"):
        FlowEstimator(cnf.models.nsf(2))
    with pytest.raises(ValueError, match="give embedding="):
        posterior_estimator()(torch.randn(9, 2), torch.randn(9, 3, 4))
    with pytest.raises(ValueError, match=r"of shape \(N, D\).*got \(9, 3, 4\)"):
        likelihood_estimator()(torch.randn(9, 2), torch.randn(9, 3, 4))


@pytest.mark.parametrize(
    ("x", "condition", "words"),
    [
        (torch.zeros(2), torch.zeros(3), r"\(samples, batch, .*got \(2,\)"),
        (torch.zeros(4, 2), torch.zeros(5, 3), r"got \(4, 2\) and conditions of shape \(5, 3\)"),
        (torch.zeros(1, 1, 4, 2), torch.zeros(4, 3), r"got \(1, 1, 4, 2\)"),
        (torch.zeros(4, 5), torch.zeros(4, 3), r"input of shape \(\*, 2\), got \(4, 5\)"),
        (torch.zeros(4, 2), None, "condition to be a torch.Tensor, got NoneType"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, condition, words):
    estimator = FlowEstimator(cnf.models.nsf(2, context=3, **HIDDEN))
    with pytest.raises(ValueError, match=f"^FlowEstimator.*: expected .*{words}"):
        estimator.log_prob(x, condition)


def test_simulations_that_are_empty_or_nan_are_refused():
    with pytest.raises(ValueError, match=r"sbi: expected one vector or more, .* got \(0, 2\)"):
        posterior_estimator()(torch.zeros(0, 2), torch.zeros(0, 3))
    theta = torch.eye(9)[:, :2].log()
    with pytest.raises(ValueError, match="sbi: .* to be finite, got NaN or infinity in 9 of 9"):
        posterior_estimator()(theta, torch.zeros(9, 3))
    with pytest.raises(TypeError, match="FlowEstimator: expected a cnf.Flow, got str"):
        FlowEstimator("nsf")  # pyright: ignore


def test_two_estimators_of_one_builder_have_embeddings_of_their_own():
    builder = posterior_estimator("maf", embedding=torch.nn.Linear(3, 4))
    theta, x = torch.randn(50, 2), torch.randn(50, 3)
    first, second = builder(theta, x), builder(theta, x)
    assert first.embedding[1] is not second.embedding[1]


def test_an_objective_without_data_is_refused():
    objective = cnf.ReverseKL(lambda x: -x.square().sum(-1))
    with pytest.raises(ValueError, match="an objective that learns from simulations"):
        posterior_estimator("maf", objective)(torch.randn(50, 2), torch.randn(50, 3))
