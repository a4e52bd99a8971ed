"""Dequantization against sums over cells, and the bound on log P(x)."""

import itertools
import math

import pytest
import torch

import cnf
from cnf import Flow
from cnf.dequantization import UniformDequantization, VariationalDequantization
from cnf.distributions import StandardNormal
from cnf.transforms import Standardize

F64 = torch.float64


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_flow(dequantization):
    """Two independent normals, mean 2 and standard deviation 1.5, of 4 levels each."""
    place = Standardize((2,))
    place.settle({"loc": torch.full((2,), 2.0), "scale": torch.full((2,), 1.5)}, F64)
    flow = Flow(StandardNormal((2,)), place, dequantization=dequantization)
    return flow.double()


def cell_log_masses():
    """The exact log P(x) of `normal_flow`, by the normal distribution function."""
    cdf = torch.special.ndtr((torch.arange(5, dtype=F64) - 2) / 1.5)
    cells = cdf.diff().log()
    return {x: (cells[x[0]] + cells[x[1]]).item() for x in itertools.product(range(4), repeat=2)}


def trained_noise(x):
    torch.manual_seed(0)
    noise = VariationalDequantization(x.shape[1:], levels=4, layers=2, hidden=(16, 16)).double()
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws(), dtype=F64))
    return noise


@pytest.mark.parametrize("kind", ["uniform", "variational", "variational in float32"])
def test_importance_weights_give_the_mass_of_each_cell(kind):
    """Of rows in float64, also where the couplings of the noise are in float32."""
    grid = torch.tensor(list(itertools.product(range(4), repeat=2)), dtype=F64)
    noise = UniformDequantization(4) if kind == "uniform" else trained_noise(grid)
    flow, truth = normal_flow(noise), cell_log_masses()
    flow = flow.float() if "float32" in kind else flow
    with torch.no_grad():
        log_p = flow.log_prob(grid.repeat(4000, 1), generator=draws()).reshape(4000, 16).double()
    bound, tight = log_p.mean(0), log_p.logsumexp(0) - math.log(4000)
    exact = torch.tensor([truth[tuple(int(k) for k in x)] for x in grid.tolist()], dtype=F64)
    error = (log_p - tight).exp().std(0) / 4000**0.5  # relative, of the mean weight
    assert ((tight - exact).abs() < 5 * error).all() and (error < 0.03).all()
    assert (bound < exact).all()
    inside = math.erf(2 / 1.5 / 2**0.5) ** 2  # the flow's mass on [0, 4]²
    assert tight.exp().sum().item() == pytest.approx(inside, rel=0.01)


SHAPES = [(1,), (3,), (1, 4, 6), (3, 4, 4), (3, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_q_is_the_density_of_the_noise(shape):
    """By autograd: e -> u is one-to-one, so that log q(u) = log N(e) - log|det du/de|."""
    generator = draws(1)
    x = torch.randint(0, 4, (1, *shape), generator=generator).double()
    noise = trained_noise(x)
    e = torch.randn(x.shape, generator=draws(2), dtype=F64)
    u, log_q = noise.noise(x, draws(2))
    axis = -len(shape)

    def u_of(flat):
        centered = 2 * x / 3 - 1
        moved, _ = noise.transform(torch.cat([centered, flat.reshape(x.shape)], axis))
        return torch.special.ndtr(moved.tensor_split(2, axis)[1]).flatten()

    assert torch.equal(u_of(e.flatten()), u.flatten())
    jacobian = torch.func.jacrev(u_of)(e.flatten())
    log_normal = -0.5 * (e.square() + math.log(2 * math.pi)).sum()
    expected = log_normal - torch.linalg.slogdet(jacobian).logabsdet
    assert log_q.item() == pytest.approx(expected.item(), abs=1e-9)
    assert u.min() > 0 and u.max() < 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_depends_on_x_and_on_every_draw(shape):
    x = torch.zeros(2, *shape, dtype=F64)
    x[1] = 3
    noise = trained_noise(x)
    same = torch.randn(shape, generator=draws(), dtype=F64).expand(x.shape).clone()
    moved, _ = noise.transform(torch.cat([2 * x / 3 - 1, same], -len(shape)))
    u = moved.tensor_split(2, -len(shape))[1]
    assert (u[0] != u[1]).all()


def test_dequantization_learns_by_likelihood_and_is_saved(tmp_path):
    """A variational bound is tighter than a uniform one of the same model."""
    x = torch.randint(0, 2, (512, 2), generator=draws()).double()
    x[:, 1] = x[:, 0]
    bounds = {}
    for kind in ("uniform", "variational"):
        torch.manual_seed(0)
        noise = UniformDequantization(2)
        if kind == "variational":
            noise = VariationalDequantization((2,), 2, hidden=(32,))
        body = cnf.models.realnvp(2, layers=2, hidden=(16,))
        flow = Flow(None, body.transform, Standardize((2,)), noise, event_shape=(2,)).double()
        config = cnf.TrainConfig(steps=300, batch_size=256, lr=5e-3, validations=0, progress=False)
        cnf.fit(flow, "maximum-likelihood", x, config)
        with torch.no_grad():
            bounds[kind] = flow.log_prob(x.repeat(20, 1), generator=draws(3)).mean().item()
    assert bounds["variational"] > bounds["uniform"] + 0.1
    cnf.save(flow, tmp_path / "flow.safetensors")
    assert any(name.startswith("dequantization.") for name in flow.state_dict())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_pixels_of_any_type_have_one_density_and_come_back(dtype):
    flow = normal_flow(UniformDequantization(4)).float()
    x = torch.randint(0, 4, (50, 2), generator=draws())
    log_p = flow.log_prob(x.to(dtype), generator=draws(1))
    assert log_p.dtype == torch.float32
    assert torch.equal(log_p, flow.log_prob(x.float(), generator=draws(1)))
    y, _ = flow.dequantization.encode(x.float(), draws(1))
    assert torch.equal(flow.dequantization.decode(y), x.float())


def test_codes_repeat_with_the_generator_of_their_noise():
    """z = (x + u - 2) / 1.5 with the noise u that the generator draws."""
    flow, x = normal_flow(UniformDequantization(4)), torch.tensor([[0, 3], [1, 2]])
    z = flow.encode(x, generator=draws(7))
    u = UniformDequantization(4).noise(x.double(), draws(7))[0]
    torch.testing.assert_close(z, (x + u - 2) / 1.5)
    assert not torch.equal(z, flow.encode(x, generator=draws(8)))


def test_rounding_never_leaves_the_cell(monkeypatch):
    top = torch.nextafter(torch.ones(()), torch.zeros(()))
    noise = UniformDequantization(256)
    monkeypatch.setattr(noise, "noise", lambda x, generator: (top.expand(x.shape), 0.0))
    x = torch.arange(256.0)[:, None]
    y, _ = noise.encode(x)
    assert torch.equal(y.floor(), x) and y.max() < 256


def test_a_point_beyond_the_levels_is_the_nearest_level():
    y = torch.tensor([-0.5, 0.0, 3.999, 4.0, 700.0, math.inf, math.nan])
    expected = torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0, 3.0, math.nan])
    torch.testing.assert_close(UniformDequantization(4).decode(y), expected, equal_nan=True)


def test_noise_of_a_flow_in_bfloat16_has_more_digits_than_the_flow():
    """Above 128 bfloat16 has whole numbers only: a cell would be its lower end."""
    flow = Flow(None, Standardize((1,)), dequantization=UniformDequantization(), event_shape=(1,))
    flow.preprocess = Standardize((1,))
    numbers = {"loc": torch.full((1,), 200.0), "scale": torch.ones(1)}
    flow.preprocess.settle(numbers, torch.float32)
    x = torch.full((4_000, 1), 200, dtype=torch.uint8)
    z = flow.bfloat16().encode(x)
    assert z.dtype == torch.bfloat16 and z.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_preprocessing_is_fitted_to_pixels_with_their_noise_the_same_each_time():
    x = torch.full((1_000, 2), 7, dtype=torch.uint8)
    places = []
    for _ in range(2):
        body = cnf.models.realnvp(2, layers=1, hidden=(4,))
        flow = Flow(None, body.transform, Standardize((2,)), UniformDequantization(), (2,))
        config = cnf.TrainConfig(steps=1, batch_size=50, validations=0, progress=False)
        cnf.fit(flow, "maximum-likelihood", x, config)
        places.append(flow.preprocess)
    assert places[0].loc.tolist() == pytest.approx([7.5, 7.5], abs=0.05)
    assert places[0].scale.tolist() == pytest.approx([12**-0.5] * 2, rel=0.05)
    assert torch.equal(places[0].loc, places[1].loc)


def test_nan_and_batch_shapes_stay_in_their_rows():
    flow = normal_flow(VariationalDequantization((2,), 4, hidden=(8,)))
    x = torch.randint(0, 4, (3, 5, 2), generator=draws()).double()
    log_p = flow.log_prob(x, generator=draws(1))
    assert log_p.shape == (3, 5)
    assert flow.log_prob(x[0, 0], generator=draws(1)).shape == ()
    x[1, 2, 0] = torch.nan
    bad = flow.log_prob(x, generator=draws(1))
    assert bad.isnan().nonzero().tolist() == [[1, 2]]
    assert torch.equal(bad[0], log_p[0]) and torch.equal(bad[2], log_p[2])


@pytest.mark.parametrize("values", [[0.5, 1.0], [-1.0, 0.0], [4.0, 0.0]])
def test_numbers_that_are_no_levels_are_refused(values):
    flow = normal_flow(UniformDequantization(4))
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 3, got .*give levels="):
        flow.log_prob(torch.tensor([values], dtype=F64))


def test_odd_gray_pictures_need_uniform_noise():
    with pytest.raises(ValueError, match=r"even height and width.*got \(1, 5, 4\)"):
        VariationalDequantization((1, 5, 4))
    with pytest.raises(ValueError, match="levels >= 2"):
        UniformDequantization(1)


def test_numbers_on_a_gpu_are_looked_at_now_and_then(monkeypatch):
    """In the 1st, 2nd, 4th, 8th, … call, since looking waits for the GPU."""
    noise, wrong = UniformDequantization(4), torch.full((2, 2), 0.5)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    refused = []
    for call in range(1, 10):
        try:
            noise.encode(wrong)
        except ValueError:
            refused.append(call)
    assert refused == [1, 2, 4, 8]
