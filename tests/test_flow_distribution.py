"""A flow as a distribution of torch and Pyro, against MultivariateNormal."""

import pytest
import torch
from torch import distributions as td

from cnf import Flow, models
from cnf.transforms import Compose, Coupling, Sigmoid, Softplus, Standardize

F64 = torch.float64


@pytest.fixture
def contexts(generator):
    return torch.randn(4, 3, generator=generator, dtype=F64)


def normal(*batch):
    return td.MultivariateNormal(torch.zeros(*batch, 2, dtype=F64), torch.eye(2, dtype=F64))


@pytest.mark.parametrize("shape", [(2,), (4, 2), (1, 2), (5, 1, 2), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (4,)], ids=str)
def test_log_prob_broadcasts_like_that_of_a_multivariate_normal(
    batch, shape, small_flow, contexts, generator
):
    flow = small_flow("realnvp", 3 if batch else 0)
    value = torch.randn(shape, generator=generator, dtype=F64)
    p = flow.distribution(contexts if batch else None)
    found = p.log_prob(value)
    assert p.batch_shape == batch and found.shape == normal(*batch).log_prob(value).shape
    whole = value.expand(*found.shape, 2)
    context = contexts.expand(*found.shape, 3) if batch else None
    torch.testing.assert_close(found, flow.log_prob(whole, context))


def test_values_of_wrong_shape_raise_value_errors(small_flow, contexts):
    p = small_flow("realnvp", 3).distribution(contexts)
    for shape in ((3, 2), (4, 3), ()):
        with pytest.raises(ValueError, match="FlowDistribution.log_prob: expected"):
            p.log_prob(torch.zeros(shape, dtype=F64))
    with pytest.raises(ValueError, match="Flow.distribution: expected a context"):
        small_flow("realnvp", 3).distribution()


@pytest.mark.parametrize("conditional", [False, True])
def test_expand_and_sample_have_the_shapes_of_a_multivariate_normal(
    conditional, small_flow, contexts
):
    flow = small_flow("realnvp", 3 if conditional else 0)
    batch = (4,) if conditional else ()
    p, q = flow.distribution(contexts if conditional else None), normal(*batch)
    for wider in ((4,), (3, 4)):
        p_wide, q_wide = p.expand(wider), q.expand(wider)
        assert p_wide.batch_shape == q_wide.batch_shape == wider
        for shape in ((), (5,), (2, 5)):
            drawn = p_wide.sample(shape)
            assert drawn.shape == q_wide.sample(shape).shape
            assert p_wide.log_prob(drawn).shape == q_wide.log_prob(drawn).shape
        one = torch.zeros(2, dtype=F64)
        assert p_wide.log_prob(one).shape == q_wide.log_prob(one).shape == wider
        assert p_wide.flow is flow  # the weights that training moves
        rows = p_wide.sample((50,)).reshape(50, -1)
        assert len(rows.unique(dim=1).T) == rows.shape[1]  # each of the batch is drawn anew
    words = r"expand: expected a shape that the batch shape \(.*\) broadcasts to, got \("
    with pytest.raises(ValueError, match=words):
        p.expand((4, 3) if conditional else (-2,))


def test_distribution_works_in_mixtures_independent_and_transformed(
    small_flow, contexts, generator
):
    flow = small_flow("realnvp", 3)
    p = flow.distribution(contexts)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    mixture = td.MixtureSameFamily(td.Categorical(weights), p)
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    parts = torch.stack([flow.log_prob(x, context) for context in contexts])
    expected = (parts + weights.log()[:, None]).logsumexp(0)
    torch.testing.assert_close(mixture.log_prob(x), expected)
    assert mixture.sample((6,)).shape == (6, 2)
    joint = td.Independent(p, 1)
    torch.testing.assert_close(joint.log_prob(x[:4]), p.log_prob(x[:4]).sum())
    outer = td.TransformedDistribution(p, [td.transforms.ExpTransform()])
    y = x[:4].exp()
    torch.testing.assert_close(outer.log_prob(y), p.log_prob(x[:4]) - x[:4].sum(-1))
    assert outer.rsample((3,)).shape == (3, 4, 2)
    with pytest.raises(NotImplementedError):
        td.kl_divergence(p, p)


def test_support_is_the_box_of_the_last_transform():
    inside, outside = torch.tensor([0.5, 0.5]), torch.tensor([0.5, -0.5])
    for last in (Sigmoid(), Softplus()):
        p = Flow(None, Compose([Coupling(2), last]), event_shape=(2,)).distribution()
        assert p.support.check(inside) and not p.support.check(outside)
        assert p.log_prob(outside) == -torch.inf and p.log_prob(inside).isfinite()
        assert p.support.check(p.sample((9,))).all()
    for transform, preprocess, bounded in (
        (Compose([Sigmoid(), Coupling(2)]), None, False),
        (Compose([Coupling(2), Sigmoid()]), Standardize((2,)), False),
        (Coupling(2), Sigmoid(), True),
    ):
        p = Flow(None, transform, preprocess, event_shape=(2,)).distribution()
        assert p.support.check(outside) != bounded


def test_distribution_is_a_pyro_distribution_if_pyro_is_installed(small_flow, contexts, generator):
    pyro = pytest.importorskip("pyro")
    flow = small_flow("realnvp", 3)
    x = torch.randn(4, 2, generator=generator, dtype=F64)

    def model(data=None):
        z = pyro.sample("z", flow.distribution(contexts[0]))
        with pyro.plate("rows", 4):
            return z, pyro.sample("x", flow.distribution(contexts), obs=data)

    p = flow.distribution(contexts)
    assert isinstance(p, pyro.distributions.torch_distribution.TorchDistributionMixin)
    trace = pyro.poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    expected = flow.log_prob(x, contexts).sum() + flow.log_prob(z, contexts[0])
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    drawn = pyro.poutine.trace(model).get_trace()
    assert drawn.nodes["x"]["value"].shape == (4, 2)
    mask = torch.tensor([True, False, True, False])
    kept = p.mask(mask).log_prob(x)
    torch.testing.assert_close(kept, p.log_prob(x) * mask)
    assert p.to_event(1).event_shape == (4, 2) and p.expand_by((3,)).batch_shape == (3, 4)
    assert p().shape == (4, 2)


def test_distribution_trains_as_a_guide_in_pyro(small_flow):
    pyro = pytest.importorskip("pyro")
    flow = small_flow("nice", gain=0.1)

    def model():
        pyro.sample("z", normal())

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow.distribution())

    pyro.clear_param_store()
    loss = pyro.infer.Trace_ELBO(num_particles=16).differentiable_loss(model, guide)
    loss.backward()
    gradients = [p.grad for p in flow.parameters()]
    assert all(g is not None for g in gradients) and max(g.abs().max() for g in gradients) > 0
    pyro.clear_param_store()


@pytest.mark.parametrize("name", ["mean", "variance", "stddev", "entropy", "cdf", "icdf"])
def test_errors_for_moments_propose_an_estimate_that_works(name):
    distribution = Flow(None, Standardize((2,)), event_shape=(2,)).distribution()
    normal = td.Normal(torch.zeros(2), torch.ones(2))
    value = {"cdf": torch.tensor([0.5, 1.0]), "icdf": torch.tensor(0.3)}.get(name)
    with pytest.raises(NotImplementedError, match=f"FlowDistribution.{name}: ") as raised:
        found = getattr(distribution, name)
        found() if value is None else found(value)
    exact = {
        "cdf": lambda: normal.cdf(value).prod(),
        "icdf": lambda: normal.icdf(value),
        "entropy": lambda: normal.entropy().sum(),
    }.get(name, lambda: getattr(normal, name))()
    proposed = str(raised.value).partition("from samples: ")[2].partition(", of each")[0]
    named = {"sample": distribution.sample, "log_prob": distribution.log_prob, "n": 40_000}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        estimate = eval(proposed, {**named, "value": value})
    assert (estimate - exact).abs().max() < 0.03  # of 40,000 draws


@pytest.mark.parametrize("use", [lambda d: d.mode, lambda d: d.enumerate_support()])
def test_mode_and_enumerate_support_are_refused_with_a_message(use):
    with pytest.raises(NotImplementedError, match="FlowDistribution.*; .*sample"):
        use(Flow(None, Standardize((2,)), event_shape=(2,)).distribution())


def test_repr_names_the_model_and_the_shapes():
    nsf = models.build("nsf", dim=3, context=2)
    said = repr(nsf.distribution(torch.zeros(4, 2))).removeprefix("Pyro")  # once it is imported
    assert said == ("FlowDistribution(nsf, batch_shape: (4,), event_shape: (3,))")
    said = repr(Flow(None, Standardize((2,)), event_shape=(2,)).distribution())
    assert said.removeprefix("Pyro") == (
        "FlowDistribution(Standardize, batch_shape: (), event_shape: (2,))"
    )
