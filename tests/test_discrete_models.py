"""The discrete models: initial values, mixing between layers, angles and saving."""

import math

import pytest
import torch

import cnf
from cnf.models import build
from cnf.nets import running_rms
from cnf.transforms import Autoregressive, Coupling, Inverse

F64 = torch.float64
CONTINUOUS = ("cnf", "ffjord", "rnode", "otflow")
DISCRETE = [name for name in cnf.models.MODELS.taking("dim") if name not in CONTINUOUS]
MIXED = [
    (name, between)
    for name in ("realnvp", "nsf", "nsf-ar", "maf", "iaf")
    for between in (None, "shuffle", "lu", "reverse")
    if between != "reverse" or name in ("nsf-ar", "maf", "iaf")
]


@pytest.mark.parametrize("name", ["realnvp", "nsf", "nsf-ar", "maf", "iaf"])
def test_models_that_start_at_the_identity_in_their_paper_do(name, generator):
    x = 2 * torch.randn(5, 3, generator=generator)
    z = build(name, dim=3, preprocess=None, between=None).encode(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-5)


def test_nice_trains_away_from_its_start_on_symmetric_data():
    # Shifts of zero would have no gradient here but noise: E[x | y] = 0.
    flow = build("nice", dim=2, hidden=(32,), layers=2, preprocess=None)
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * 2
    flow.log_prob(x).mean().backward()
    shifts = [part.net.layers[-1].bias.grad for part in flow.transform.transforms[:2]]
    assert min(grad.abs().max() for grad in shifts) > 1e-3


@pytest.mark.parametrize(("name", "between"), MIXED)
@pytest.mark.parametrize("dim", [2, 3, 5])
def test_every_variable_is_transformed_given_others(name, between, dim, randomized, generator):
    flow = randomized(build(name, dim=dim, layers=4, hidden=(9,), between=between), gain=0.5)
    parts = [part for part in flow.transform.transforms]
    for part in parts:  # without what mixes, a variable is what layers made of it
        if not isinstance(part, Coupling | Autoregressive | Inverse) and between == "lu":
            for parameter in part.parameters():
                parameter.data.zero_()
    x = torch.randn(dim, generator=generator, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(flow.encode, x)
    reached = jacobian.abs() > 1e-12
    # Autoregressive layers in one order leave the first variable to itself.
    alone = name in ("nsf-ar", "maf", "iaf") and between in (None, "lu")
    assert (reached.sum(1) > 1).sum() >= dim - alone
    assert (flow.encode(x) - x).abs().min() > 1e-6


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", DISCRETE)
def test_gradients_equal_finite_differences(name, context, small_flow, generator):
    options = {} if name in ("planar", "radial", "sylvester") else {"hidden": (5,)}
    if options and name != "glow":
        options["activation"] = "tanh"  # no corners, which a difference would cut
    flow = small_flow(name, context, dim=3, gain=0.5, layers=3, **options)
    x, c = (torch.randn(2, size, generator=generator, dtype=F64) for size in (3, context))
    given = [c.requires_grad_()] if context else []

    def density(x, *_):
        return flow.log_prob(x, *given)

    def drawn(*_):
        return flow.rsample(2, *given, generator=torch.Generator().manual_seed(0))

    inputs = [*given, *flow.parameters()]
    assert torch.autograd.gradcheck(density, (x.requires_grad_(), *inputs), fast_mode=True)
    assert torch.autograd.gradcheck(drawn, inputs, fast_mode=True)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_couplings_transform_every_variable_for_any_seed(seed, randomized, generator):
    torch.manual_seed(seed)
    flow = build("realnvp", dim=2, layers=2, hidden=(9,), between="shuffle", preprocess=None)
    x = torch.randn(2, generator=generator, dtype=F64)
    z = randomized(flow).encode(x)
    assert (z[:, None] - x).abs().min() > 1e-6  # no variable comes out as it went in, wherever


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_orders_differ_from_layer_to_layer(seed, randomized, generator):
    torch.manual_seed(seed)
    flow = randomized(build("maf", dim=2, layers=2, hidden=(9,), between="shuffle"))
    x = torch.randn(2, generator=generator, dtype=F64)
    assert torch.autograd.functional.jacobian(flow.encode, x).abs().min() > 1e-6


def test_options_that_would_be_ignored_are_refused():
    angles = {"period": 1.0, "between": None, "preprocess": None}
    for name, options, text in (
        ("glow", {"dim": 2, "levels": 3}, "levels are those of an image"),
        ("glow", {"shape": (1, 4, 4), "hidden": (8, 8, 8)}, "two widths in hidden"),
        ("nsf", {"dim": 2, "hidden": 64}, r"list of widths, such as \(64, 64\), got 64"),
        ("nsf-ar", {"dim": 2, "bound": 3.0, **angles}, "nsf-ar: angles have no linear map"),
    ):
        with pytest.raises(ValueError, match=text):
            build(name, **options)


def test_reversed_halves_are_refused():
    with pytest.raises(ValueError, match="between"):
        build("realnvp", dim=2, between="reverse")


@pytest.mark.parametrize(
    "name", [name for name in cnf.models.MODELS.taking("dim") if name != "cnf"]
)
def test_random_permutations_and_rotations_are_saved_and_loaded(name, tmp_path, generator):
    options = {"dim": 5, "context": 2}
    if name in ("realnvp", "nsf", "nsf-ar", "maf", "iaf"):
        options["between"] = "shuffle"
    flow = build(name, **options).eval()
    x, context = (torch.randn(4, size, generator=generator) for size in (5, 2))
    again = cnf.load(cnf.training.save(flow, tmp_path / "model.safetensors")).eval()
    with torch.no_grad():
        assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))


@pytest.mark.parametrize("name", ["nsf", "nsf-ar"])
def test_flow_of_angles_is_a_density_on_the_torus(name, randomized):
    options = {"period": 2 * math.pi, "between": None, "preprocess": None, "bins": 5}
    flow = randomized(build(name, dim=2, hidden=(9,), **options), gain=0.4)
    axis = torch.linspace(-math.pi, math.pi, 201, dtype=F64)[:-1]
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(200, 200)
        drawn = flow.sample(500)
    assert density.mean().item() * (2 * math.pi) ** 2 == pytest.approx(1, abs=2e-3)
    assert drawn.abs().max() <= math.pi
    turned = drawn + 2 * math.pi * torch.tensor([1.0, -3.0], dtype=F64)
    torch.testing.assert_close(flow.log_prob(turned), flow.log_prob(drawn))
    seam = (density[0] - density[-1]).abs().max(), (density[:, 0] - density[:, -1]).abs().max()
    inner = (density[1:] - density[:-1]).abs().max()
    assert max(seam) < 2 * inner  # no jump where the angle begins again
    with pytest.raises(ValueError, match=f"{name}: angles have no linear map"):
        build(name, dim=2, period=1.0)


@pytest.mark.parametrize("layers", [1, 4])
def test_angles_at_the_seam_have_a_finite_density_in_float32(layers, randomized, generator):
    options = {"period": 2.0, "between": None, "preprocess": None, "hidden": (9,)}
    flow = randomized(build("nsf", dim=2, layers=layers, **options)).float()
    edge = torch.tensor([1.0, -1.0, 1 - 6e-8, -1 + 6e-8, 0.3])
    x = torch.cat([torch.cartesian_prod(edge, edge), flow.sample(20_000, generator=generator)])
    assert torch.isfinite(flow.log_prob(x)).all()
    assert x.abs().max() <= 1


def test_glow_is_initialized_by_the_data_it_is_fitted_to(generator):
    x = torch.randn(500, 2, generator=generator) * torch.tensor([3.0, 0.1]) + 7
    flow = build("glow", dim=2, layers=3)
    flow.preprocess.fit(x)
    flow.train().log_prob(x).mean().backward()  # a look sets nothing
    assert not flow.transform.transforms[2].initialized
    flow.initialize(x)
    assert flow.training
    z = flow.encode(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=1e-3)
    assert (z.std(0) - 1).abs().max() < 0.1  # each was 1 before a rotation


def test_sylvester_has_full_rank_by_default():
    assert build("sylvester", dim=3).transform.transforms[0].rank == 3
    assert build("sylvester", dim=20).transform.transforms[0].rank == 8
    assert build("sylvester", dim=3, rank=1).transform.transforms[0].rank == 1


def test_made_with_one_layer_is_a_mixture_of_logistics_given_those_before(randomized, generator):
    options = {"hidden": (9, 9), "components": 3, "divisive": 0.1, "residual": True}
    flow = randomized(build("made", dim=3, preprocess=None, **options))
    (layer,) = flow.transform.transforms
    x = torch.randn(4, 3, generator=generator, dtype=F64)
    sizes = running_rms(x.T[:-1], 0.1)
    log_weights, means, log_scales = layer.transformer.parametrize(layer.net(x))
    y = (x.T / sizes - means) / log_scales.exp()
    each = log_weights + y.sigmoid().log() + (-y).sigmoid().log() - log_scales - sizes.log()
    torch.testing.assert_close(flow.log_prob(x), each.logsumexp(0).sum(0))


@pytest.mark.parametrize("divisive", [None, 0.1])
def test_made_is_a_density(divisive, randomized):
    flow = randomized(build("made", dim=2, hidden=(7, 7), divisive=divisive, preprocess=None))
    axis = torch.linspace(-60, 60, 1201, dtype=F64)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert density.sum().item() * 0.1**2 == pytest.approx(1, abs=2e-3)


def test_made_draws_from_its_density(randomized, generator):
    flow = randomized(build("made", dim=3, hidden=(7, 7), divisive=0.1, residual=True))
    with torch.no_grad():
        x, log_prob = flow.sample_and_log_prob(50, generator=generator)
        torch.testing.assert_close(flow.log_prob(x), log_prob)
