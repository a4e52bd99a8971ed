"""Variational inference: closed forms, gradients at the optimum, amortized posteriors."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import cnf
from cnf.flow import Flow
from cnf.metrics import log_evidence
from cnf.models import MODELS, build
from cnf.objectives import Batch, ImportanceWeighted, ReverseKL
from cnf.objectives.variational import FIRST, BaseDraws
from cnf.transforms import Transform

F64 = torch.float64


class Diagonal(Transform):
    """x = e^s z + m."""

    def __init__(self, loc, scale):
        super().__init__(1, 0, (2,))
        self.loc = nn.Parameter(torch.tensor(loc))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, z, context=None):
        return self.log_scale.exp() * z + self.loc, self.log_scale.sum().expand(z.shape[:-1])

    def inverse(self, x, context=None):
        z = (x - self.loc) * (-self.log_scale).exp()
        return z, -self.log_scale.sum().expand(x.shape[:-1])


def gaussian(loc=(0.5, -1.0), scale=(0.8, 1.5)):
    """The flow that is the normal distribution of these."""
    return Flow(None, Diagonal(loc, scale), event_shape=(2,)).double()


TARGET = MultivariateNormal(
    torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=F64)
)
FACTOR = 3.0  # the log of the target's integral


def log_density(x):
    return TARGET.log_prob(x) + FACTOR


def draws_of(objective, flow, n, seed=0, context=None):
    batch = Batch(torch.empty(n, 0), context)
    return objective.prepare(flow, batch, torch.Generator().manual_seed(seed))


def gradients(objective, flow, n, seed=0):
    loss = objective(flow, draws_of(objective, flow, n, seed)).value
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.parameters()))])


def exact_kl(flow):
    """KL(q ‖ p), differentiable."""
    t = flow.transform
    q = MultivariateNormal(t.loc, torch.diag((2 * t.log_scale).exp()))
    return kl_divergence(q, TARGET)


@pytest.mark.parametrize("path_gradient", [True, False])
def test_the_loss_and_its_gradient_are_those_of_the_closed_form(path_gradient):
    flow = gaussian()
    objective = ReverseKL(log_density, draws=4, path_gradient=path_gradient)
    loss = objective(flow, draws_of(objective, flow, 50_000))
    expected = exact_kl(flow)
    torch.testing.assert_close(loss.value, expected - FACTOR, rtol=0, atol=0.03)
    torch.testing.assert_close(loss.metrics["elbo"], -loss.value)
    exact = torch.cat([g for g in torch.autograd.grad(expected, list(flow.parameters()))])
    assert exact.abs().min() > 0.1
    torch.testing.assert_close(gradients(objective, flow, 50_000), exact, rtol=0, atol=0.03)


def test_along_the_path_no_gradient_is_left_where_the_flow_is_the_density():
    flow, target = gaussian(), gaussian()
    along = gradients(ReverseKL(target.log_prob), flow, 8)
    whole = gradients(ReverseKL(target.log_prob, path_gradient=False), flow, 8)
    assert along.abs().max() < 1e-12 and whole.abs().max() > 0.1


def test_the_importance_weighted_bound_is_that_of_the_weights_and_its_gradient():
    flow, objective = gaussian(), ImportanceWeighted(log_density, draws=3, path_gradient=False)
    rows = draws_of(objective, flow, 5)
    loss = objective(flow, rows).value
    x, log_q = flow.decode_and_log_prob(rows.z)
    bound = (log_density(x) - log_q).exp().mean(1).log().mean()
    torch.testing.assert_close(loss, -bound)
    both = (torch.autograd.grad(v, [*flow.parameters()]) for v in (loss, -bound))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_a_torch_distribution_that_reads_on_the_host_is_told_what_to_do():
    target = torch.distributions.MultivariateNormal(torch.ones(2), torch.eye(2))
    objective = ReverseKL(target, capturable=True)
    config = cnf.TrainConfig(steps=2, batch_size=8, compile=True, validations=0, progress=False)
    with pytest.raises(RuntimeError, match="validate_args=False, or .* capturable=False"):
        cnf.fit(cnf.models.realnvp(2, layers=1, hidden=(4,)), objective, config=config)


def test_the_doubly_reparametrized_gradient_has_the_mean_of_the_plain_one():
    flow = gaussian()
    found = {}
    for path_gradient in (True, False):
        objective = ImportanceWeighted(log_density, draws=3, path_gradient=path_gradient)
        each = torch.stack([gradients(objective, flow, 2_000, seed) for seed in range(40)])
        found[path_gradient] = each.mean(0), each.std(0) / 40**0.5
    (a, ea), (b, eb) = found[True], found[False]
    assert (a - b).abs().le(4 * (ea.square() + eb.square()).sqrt()).all()
    assert a.abs().min() > 20 * ea.max()
    plain = gradients(ReverseKL(log_density), flow, 50_000)
    assert (plain - a).abs().max() > 0.1  # which the weights change


@pytest.mark.parametrize("objective", [ReverseKL, ImportanceWeighted])
def test_losses_of_rows_have_the_loss_as_their_weighted_mean(objective):
    flow, weight = gaussian(), torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=F64)
    objective = objective(log_density, draws=3)
    rows = objective.prepare(flow, Batch(torch.empty(4, 0), weight=weight), torch.Generator())
    each = objective.per_row(flow, rows)
    loss = objective(flow, rows)
    torch.testing.assert_close(loss.value, (weight * each).sum() / 4)
    elbos = -ReverseKL(log_density, draws=3).per_row(flow, rows)
    torch.testing.assert_close(loss.metrics["elbo"], (weight * elbos).sum() / 4)


def test_each_draw_of_a_row_has_the_context_of_the_row(randomized):
    flow = randomized(build("maf", dim=2, context=2))
    context = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    objective = ReverseKL(lambda x, y: -(x - y).square().sum(-1), draws=3)
    rows = draws_of(objective, flow, 4, context=context)
    alone = [
        objective.per_row(flow, BaseDraws(rows.z[k : k + 1], context[k : k + 1])) for k in range(4)
    ]
    torch.testing.assert_close(objective.per_row(flow, rows), torch.cat(alone))


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_what_the_path_leaves_out_is_the_gradient_of_the_density_at_the_draws(name, randomized):
    """Of every model of vectors, draw by draw."""
    tight = {"hidden": (8,), "solver": cnf.Solver(rtol=1e-9, atol=1e-9)}
    flow = randomized(build(name, dim=2, context=2, **(tight if name == "cnf" else {})))
    context = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    weights = [p for p in flow.parameters() if p.requires_grad]

    def gradient(loss):
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [
            torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)
        ]

    def target(x, y):
        return -0.5 * (x - y).square().sum(-1)

    losses = {}
    for path_gradient in (True, False):
        objective = ReverseKL(target, path_gradient=path_gradient)
        rows = draws_of(objective, flow, 20, context=context)
        losses[path_gradient] = objective(flow, rows).value
    x = flow.decode(rows.z[:, 0], context).detach()
    score = gradient(flow.log_prob(x, context).mean())
    along, whole = gradient(losses[True]), gradient(losses[False])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=1e-5)
    for a, b, c in zip(along, whole, score, strict=True):
        torch.testing.assert_close(a + c, b, rtol=1e-4, atol=1e-4)
    assert max(c.abs().max() for c in score) > 0.01


def test_an_ode_is_solved_as_its_recipe_trains_it(randomized):
    flow = randomized(build("otflow", dim=2))
    objective = ReverseKL(log_density, path_gradient=False)
    rows = draws_of(objective, flow, 20)
    coarse = flow.with_solver(flow.transform.recipe.solver)
    own, trained = (
        (log_q - log_density(x)).mean().item()
        for x, log_q in (each.decode_and_log_prob(rows.z[:, 0]) for each in (flow, coarse))
    )
    assert abs(own - trained) > 1e-6  # 16 steps and 8
    assert objective(flow, rows).value.item() == pytest.approx(trained, abs=1e-12)


MIXING, NOISE = torch.tensor([[1.0, 0.5], [-0.3, 1.5]]), 0.7  # y = A x + noise


def joint(x, y):
    likelihood = Normal(x @ MIXING.T, NOISE).log_prob(y).sum(-1)
    return Normal(0.0, 1.0).log_prob(x).sum(-1) + likelihood


def evidence(y):
    covariance = MIXING @ MIXING.T + NOISE**2 * torch.eye(2)
    return MultivariateNormal(torch.zeros(2), covariance).log_prob(y)


def observed(n, seed=0):
    draws = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(seed))
    return draws[0] @ MIXING.T + NOISE * draws[1]


@pytest.mark.slow
@pytest.mark.parametrize("name, objective", [("nsf", ReverseKL), ("cnf", ImportanceWeighted)])
def test_fit_learns_the_posterior_of_every_observation(name, objective):
    options = {"hidden": (32, 32), "solver": cnf.Solver("rk4", steps=4)} if name == "cnf" else {}
    flow = build(name, dim=2, context=2, **options)
    config = cnf.TrainConfig(
        steps=250, batch_size=128, validations=1, progress=False, compile=False
    )
    history = cnf.fit(flow, objective(joint, draws=2), context=observed(2_000), config=config)
    y = observed(50, seed=1)
    told = log_evidence(flow, joint, 500, y)
    assert (told.elbo - evidence(y)).mean() > -0.2
    assert (told.value - evidence(y)).abs().max() < 0.15
    held_out = history.records[-1]["val_loss"]
    assert held_out == pytest.approx(-float(evidence(observed(2_000)).mean()), abs=0.3)


def test_fit_without_data_draws_from_the_flow_alone(tmp_path):
    flow = build("realnvp", dim=2)
    config = cnf.TrainConfig(steps=150, batch_size=128, progress=False, folder=tmp_path / "run")
    history = cnf.fit(flow, ReverseKL(TARGET), config=config)
    told = log_evidence(flow, log_density)
    assert abs(told.value - FACTOR) < 4 * told.error < 0.05 and told.elbo > FACTOR - 0.05
    assert "val_loss" not in history.records[-1]


def test_the_seed_decides_and_not_how_a_run_was_cut():
    def weights(*steps):
        flow = gaussian()
        for n in steps:
            cnf.fit(
                flow, ReverseKL(log_density),
                config=cnf.TrainConfig(steps=n, batch_size=16, progress=False, seed=3),
            )  # fmt: skip
        return torch.cat([p.flatten() for p in flow.parameters()])

    assert torch.equal(weights(5), weights(5)) and not torch.equal(weights(5), weights(6))


@pytest.mark.parametrize(
    "density, said",
    [
        (lambda x: -x.square(), r"shape \(256,\) for x of shape \(256, 2\).*got shape \(256, 2\)"),
        (lambda x: 1.0, "got float"),
        (lambda x: -x.detach().square().sum(-1), "no gradient in x"),
        (lambda x: torch.where(x[:, 0] > 0, -x.sum(-1), -torch.inf), "-inf at .* of 256 draws"),
        (lambda x: x.sum(-1) * torch.nan, "nan at 256 of 256 draws"),
    ],
)
def test_a_density_that_cannot_be_learned_is_refused_before_training(density, said):
    with pytest.raises(ValueError, match=said):
        cnf.fit(gaussian(), ReverseKL(density), config=cnf.TrainConfig(steps=1, progress=False))


def test_what_is_no_density_or_no_number_of_draws_is_refused():
    with pytest.raises(TypeError, match="expected log_density to be a function of x.*got int"):
        ReverseKL(3)
    with pytest.raises(ValueError, match="draws"):
        ImportanceWeighted(log_density, draws=0)


def test_a_context_keeps_its_gradient_along_the_path_alone(randomized):
    """That of an encoder, of which the density of constants is no function."""
    flow = randomized(build("maf", dim=2, context=2))
    context = torch.randn(6, 2, dtype=F64, requires_grad=True)
    objective = ReverseKL(lambda x, y: flow.log_prob(x, y.detach()))
    loss = objective(flow, draws_of(objective, flow, 6, context=context)).value
    (gradient,) = torch.autograd.grad(loss, context)
    assert gradient.abs().max() < 1e-10  # q = p


def test_data_that_are_not_used_are_told():
    config = cnf.TrainConfig(steps=1, batch_size=8, progress=False)
    with pytest.warns(UserWarning, match="no more of the data than their contexts"):
        cnf.fit(gaussian(), ReverseKL(log_density), torch.randn(40, 2), config)


def quartic(x):
    return -((x - 1).square() + 0.1 * x**4).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("path_gradient", [True, False])
def test_a_density_that_is_the_same_each_time_is_compiled_to_the_same_steps(path_gradient):
    def trained(compile):
        torch.manual_seed(0)
        flow = build("realnvp", dim=2, layers=2, hidden=[8])
        settings = cnf.TrainConfig(steps=12, batch_size=64, compile=compile, progress=False)
        objective = ReverseKL(quartic, path_gradient=path_gradient, capturable=True)
        history = cnf.fit(flow, objective, config=settings)
        assert history.compiled is compile
        return torch.cat([weight.flatten() for weight in flow.parameters()])

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-5)


def test_a_density_that_may_change_is_not_compiled():
    settings = cnf.TrainConfig(steps=2, compile=True, progress=False)
    with pytest.raises(ValueError, match="ReverseKL, of which capturable is False"):
        cnf.fit(gaussian().float(), ReverseKL(quartic), config=settings)


@pytest.mark.parametrize("path_gradient", [True, False])
def test_a_dequantized_flow_whose_samples_are_rounded_is_refused(path_gradient):
    flow = build("realnvp", dim=2, preprocess="logit", dequantization="uniform")
    settings = cnf.TrainConfig(steps=1, progress=False)
    with pytest.raises(TypeError, match="ReverseKL: a dequantized flow has no density of its"):
        cnf.fit(flow, ReverseKL(quartic, path_gradient=path_gradient), config=settings)


def test_a_draw_without_mass_counts_as_nothing_in_the_importance_weighted_bound():
    def half(x):
        return torch.where(x[:, 0] > 1, -torch.inf, -x.square().sum(-1))

    flow, z = (
        gaussian().float(),
        torch.randn(64, 16, 2, generator=torch.Generator().manual_seed(0)),
    )
    batch = BaseDraws(z)
    along, plain = (
        ImportanceWeighted(half, draws=16, path_gradient=path)(flow, batch).value
        for path in (True, False)
    )
    assert along.isfinite() and along.item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_density_of_another_shape_in_later_batches_is_refused():
    def density(x):  # right for the draws that are looked at before training
        return -x.square().sum(-1) if len(x) == FIRST else -x.square().sum()

    settings = cnf.TrainConfig(steps=1, batch_size=16, progress=False)
    with pytest.raises(ValueError, match=r"ReverseKL: expected log_density to give shape \(16,\)"):
        cnf.fit(gaussian().float(), ReverseKL(density), config=settings)
