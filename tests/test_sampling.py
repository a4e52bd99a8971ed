"""Step grids, guidance and SDEs, on flows with known distributions."""

import math

import numpy as np
import pytest
import torch

import cnf
from cnf import Flow, Solver
from cnf.fields import (
    Guided,
    MLPField,
    NullContext,
    Predicts,
    VectorField,
    WithScore,
    converted,
)
from cnf.sampling import edm_grid, guided, learned_grid, likeliest_grid, sde
from cnf.transforms import Continuous, Standardize

F64 = torch.float64
M, S = 1.5, 0.4  # the data are N(M, S²) in every coordinate
HALF = math.pi / 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Coefficients of x1, x0 and z in xt, then their derivatives.
PATHS = {
    "linear": lambda t: (t, 1 - t, 0.0, 1.0, -1.0, 0.0),
    "trigonometric": lambda t: (
        torch.sin(HALF * t), torch.cos(HALF * t), 0.0,
        HALF * torch.cos(HALF * t), -HALF * torch.sin(HALF * t), 0.0,
    ),
    "bridge": lambda t: (
        t, 1 - t, (t * (1 - t)).sqrt(), 1.0, -1.0, (1 - 2 * t) / (2 * (t * (1 - t)).sqrt()),
    ),
}  # fmt: skip


class Mean(VectorField):
    """E[target | xt = x], for a network that has learned it."""

    def __init__(self, path, target):
        super().__init__((2,))
        self.path, self.target = path, target
        self.idle = torch.nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, t, x, context=None):
        t = t.clamp(1e-3, 1 - 1e-3) if self.path == "bridge" else t
        a, b, c, da, db, dc = PATHS[self.path](t)
        centered, square = x - a * M, a**2 * S**2 + b**2 + c**2
        if self.target == "velocity":
            return da * M + (a * da * S**2 + b * db + c * dc) / square * centered
        if self.target == "x1":
            return M + a * S**2 / square * centered
        return (c if self.target == "z" else (b**2 + c**2).sqrt()) / square * centered


FLOWS = {
    "velocity, linear": (lambda: Mean("linear", "velocity"), "linear"),
    "velocity, trigonometric": (lambda: Mean("trigonometric", "velocity"), "trigonometric"),
    # these know their path, whatever is said
    "x1, trigonometric": (
        lambda: Predicts(Mean("trigonometric", "x1"), "x1", "trigonometric"), "linear"
    ),
    "noise, linear": (lambda: Predicts(Mean("linear", "noise"), "noise"), "bridge"),
    "head, bridge": (
        lambda: WithScore(Mean("bridge", "velocity"), Mean("bridge", "z"), "bridge"), "linear"
    ),
}  # fmt: skip


def gaussian_flow(name, **parts):
    make, path = FLOWS[name]
    solver = Solver("euler", steps=50)
    return Flow(None, Continuous(make(), solver), event_shape=(2,), **parts).double(), path


def assert_law(x, mean, std, bias):
    """Mean and standard deviation within 4 of their own standard errors, and the steps' bias."""
    n = x.numel()
    assert x.mean().item() == pytest.approx(mean, abs=4 * std / n**0.5 + bias)
    assert x.std().item() == pytest.approx(std, abs=4 * std / (2 * n) ** 0.5 + bias)


# Grids


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
@pytest.mark.parametrize(
    "options", [{}, {"sigma_min": 0.02, "sigma_max": 10.0, "rho": 3.0}], ids=str
)
def test_edm_grid_equals_noise_levels_of_karras_as_times(steps, options):
    low, high, rho = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, **options}.values()
    i = np.arange(steps)
    ramp = high ** (1 / rho) + i / max(1, steps - 1) * (low ** (1 / rho) - high ** (1 / rho))
    times = 1 / (1 + np.append(ramp**rho, 0.0))
    times[0] = 0.0
    grid = edm_grid(steps, **options)
    np.testing.assert_allclose(grid, times, rtol=1e-12, atol=1e-15)
    assert Solver("euler", grid=grid).steps == steps
    if steps == 18:  # a level is (1 - t)/t, and steps are shortest near the data
        assert (1 - grid[-2]) / grid[-2] == pytest.approx(low)
        assert options or np.diff(grid).argmin() == 17


@pytest.mark.parametrize("name", ["steps", "sigma_min", "sigma_max", "rho"])
def test_edm_grid_refuses_numbers_that_are_not_positive(name):
    with pytest.raises(ValueError, match=f"edm_grid: expected {name} > 0, got 0"):
        edm_grid(**{"steps": 4, name: 0})


def test_edm_grid_refuses_levels_in_the_wrong_order():
    with pytest.raises(ValueError, match="edm_grid"):
        edm_grid(4, sigma_min=80.0, sigma_max=0.002)


def test_flow_with_another_solver_samples_in_few_steps():
    flow, _ = gaussian_flow("velocity, linear")
    few = flow.with_solver(Solver("heun2", grid=edm_grid(8)))
    with cnf.dynamics.record() as stats:
        x = few.sample(20_000, generator=seeded())
    assert stats.forward == 16
    assert_law(x, M, S, 0.04)  # of 8 steps


class Late(VectorField):
    """v = 5t⁴, or 5t⁴·c: most of the way at the end."""

    def forward(self, t, x, context=None):
        v = (5 * t**4).reshape(*t.shape, *[1] * (x.dim() - t.dim())).expand_as(x)
        return v if context is None else v * context


def late_flow(context_dim=0, **parts):
    transform = Continuous(Late((2,), context_dim), Solver(rtol=1e-9, atol=1e-9))
    return Flow(None, transform, event_shape=(2,), **parts).double()


def distance(flow, grid, method, context=None, points=512, seed=0):
    """Mean distance of few steps' samples from those of the flow's own solver."""
    z = flow.base.sample((points,), seeded(seed))
    few = flow.with_solver(Solver(method, grid=tuple(grid)))
    return (few.decode(z, context) - flow.decode(z, context)).norm(dim=1).mean().item()


def test_learned_time_is_the_analytical_optimum():
    """Two Euler steps of 5t⁴ with the stop s come to (1 - s)·5s⁴, nearest to 1 at s = 0.8."""
    grid = learned_grid(late_flow(), 2, points=4)
    assert grid[0] == 0 and grid[2] == 1 and grid[1] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("explicit", "stop"), [("sample", 0.8), ("density", 0.2**0.25)])
def test_likeliest_time_is_the_analytical_optimum(explicit, stop):
    """Data at 1, where two Euler steps of 5t⁴ come to (1 - s)·5s⁴ or, from 1 down, to more."""
    x = torch.tensor([[0.5, 1.5], [1.5, 0.5]], dtype=torch.float64)
    grid = likeliest_grid(late_flow(), x, 2, "euler", explicit)
    assert grid[0] == 0 and grid[2] == 1 and grid[1] == pytest.approx(stop, abs=0.01)


def test_likeliest_grid_folds_at_fewer_rows_first():
    """Two Euler steps of -2.5 x/(1 + t)² do not fold if they part between 0.312 and 0.4."""

    class Shrinking(VectorField):
        def forward(self, t, x, context=None):
            return -2.5 * x / (1 + t) ** 2

    flow = Flow(None, Continuous(Shrinking((1,))), event_shape=(1,)).double()
    x = 0.2 * torch.ones(3, 1, dtype=torch.float64)
    grid = likeliest_grid(flow, x, 2, "euler", "sample")
    few = flow.with_solver(Solver("euler", grid=grid, discrete=True))
    assert 0.312 < grid[1] < 0.4 and few.log_prob(x).isfinite().all()
    with pytest.warns(UserWarning, match="3 of 3 rows"):
        flow.with_solver(Solver("euler", steps=2, discrete=True)).log_prob(x)


def test_likeliest_grid_refuses_what_has_no_steps():
    with pytest.raises(TypeError, match="likeliest_grid: expected a flow whose transform"):
        likeliest_grid(cnf.models.build("realnvp", dim=2), torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match="likeliest_grid: expected steps"):
        likeliest_grid(late_flow(), torch.zeros(3, 2), 0)


def test_learned_grid_is_better_for_a_field_that_moves_at_one_end():
    flow = late_flow()
    for steps, method in ((3, "euler"), (6, "euler"), (3, "midpoint")):
        grid = learned_grid(flow, steps, method, points=4, generator=seeded())
        equal = np.linspace(0, 1, steps + 1)
        assert len(grid) == steps + 1 and (np.diff(grid) > 0).all()
        least = distance(flow, grid, method, points=4)
        assert least < 0.8 * distance(flow, equal, method, points=4)
        assert grid[1] > 1 / steps + 0.05  # it hurries over the beginning


@pytest.mark.parametrize("method", ["euler", "heun2"])
@pytest.mark.parametrize("steps", [2, 4])
def test_learned_grid_is_never_worse_on_its_own_points(method, steps, small_flow):
    flow = small_flow("rnode", solver=Solver("rk4", steps=30))
    grid = learned_grid(flow, steps, method, points=32, generator=seeded(3))
    found = distance(flow, grid, method, points=32, seed=3)
    equal = distance(flow, np.linspace(0, 1, steps + 1), method, points=32, seed=3)
    assert found <= equal and grid[0] == 0 and grid[-1] == 1
    with cnf.dynamics.record() as stats:
        flow.with_solver(Solver(method, grid=grid)).sample(2)
    assert stats.forward == steps * (1 if method == "euler" else 2)


def test_learned_grid_of_one_step_is_trivial_and_repeats_with_its_generator(small_flow):
    flow = small_flow("rnode", solver=Solver("rk4", steps=10))
    assert learned_grid(flow, 1) == (0.0, 1.0)
    before = torch.get_rng_state()
    first, again = (learned_grid(flow, 3, points=16, generator=seeded(1)) for _ in range(2))
    assert first == again and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in flow.parameters())


@pytest.mark.parametrize("shape", [(2,), (4, 2)], ids=str)
def test_grid_is_learned_for_a_context(shape, generator):
    context = 1 + torch.rand(*shape, generator=generator, dtype=F64)
    grid = learned_grid(late_flow(2), 2, context=context, points=4)
    assert grid[1] == pytest.approx(0.8, abs=0.01)
    with pytest.raises(ValueError, match="context"):
        learned_grid(late_flow(2), 2, points=4)


def test_learned_grid_of_a_discrete_flow_is_refused():
    with pytest.raises(TypeError, match="learned_grid: expected a flow whose transform is a Cont"):
        learned_grid(cnf.models.build("realnvp", dim=2), 2)
    with pytest.raises(ValueError, match="Solver: expected a grid .* and dopri5"):
        learned_grid(late_flow(), 2, "dopri5", points=4)


def test_grid_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="steps > 0, got 0"):
        learned_grid(late_flow(), 0, points=4)


def test_numbers_of_steps_that_are_not_integers_are_refused():
    for name, grid in (
        ("edm_grid", lambda: edm_grid(2.5)),
        ("learned_grid", lambda: learned_grid(late_flow(), 2.5, points=4)),
        ("sde", lambda: sde(late_flow(), 3, steps=2.5)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected steps to be a whole number, got"):
            grid()
    with pytest.raises(ValueError, match="^learned_grid: expected points to be a whole number"):
        learned_grid(late_flow(), 2, points=4.5)
    assert edm_grid(np.int64(2)) == edm_grid(2)


class Rounded:
    """Data that are whole numbers."""

    def encode(self, x, generator=None):
        u = torch.rand(x.shape, generator=generator, dtype=F64)
        return x + u, torch.zeros(x.shape[:-1], dtype=F64)

    def decode(self, y):
        return y.floor().long()


def test_learned_grid_compares_samples_before_rounding():
    grid = learned_grid(late_flow(dequantization=Rounded()), 2, points=4)
    assert grid[1] == pytest.approx(0.8, abs=0.01)


# SDEs


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", FLOWS)
def test_sde_has_the_marginal_of_the_flow_for_any_noise(name, noise):
    flow, path = gaussian_flow(name)
    x = sde(flow, 10_000, path=path, steps=200, noise=noise, generator=seeded())
    assert x.shape == (10_000, 2) and x.dtype == F64 and not x.requires_grad
    # 200 steps of Euler and Maruyama; the last of them adds g²h that nothing takes away
    assert_law(x, M, S, 0.01 + 0.006 * noise)


@pytest.mark.parametrize("g", [lambda t: 0.8, lambda t: 1.5 * (1 - t), lambda t: 1 + t.sin()])
@pytest.mark.parametrize("name", FLOWS)
def test_sde_has_the_marginal_of_the_flow_for_any_diffusion(name, g):
    flow, path = gaussian_flow(name)
    x = sde(flow, 10_000, path=path, steps=200, diffusion=g, generator=seeded())
    assert_law(x, M, S, 0.03)  # the head's score ends 0.01 before the data


def test_sde_corrects_a_wrong_base_that_the_ode_does_not():
    """What the noise is for: from a base of twice the spread, the SDE comes nearer to the data."""
    flow, _ = gaussian_flow("velocity, linear")
    wide = torch.distributions.Normal(torch.zeros(2, dtype=F64), torch.full((2,), 2.0, dtype=F64))
    flow = Flow(wide, flow.transform).double()
    off = [
        abs(sde(flow, 5000, noise=noise, generator=seeded()).std().item() - S) for noise in (0, 4)
    ]
    assert off[0] == pytest.approx(S, abs=0.02) and off[1] < 0.5 * off[0]


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("grid", [None, (0.0, 0.1, 0.5, 0.9, 1.0)])
def test_sde_without_noise_is_the_euler_method(name, grid):
    flow, path = gaussian_flow(name)
    solver = Solver("euler", steps=7) if grid is None else Solver("euler", grid=grid)
    options = {"steps": 7} if grid is None else {"grid": grid}
    found = sde(flow, (3, 2), path=path, noise=0.0, generator=seeded(), **options)
    expected = flow.with_solver(solver).sample((3, 2), generator=seeded())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_one_step_of_the_sde_by_hand():
    """dx = (v + ½g²s) h + g√h·dW with g² = 2·noise·σ, on two unequal steps."""
    flow, _ = gaussian_flow("velocity, linear")
    grid, draws = (0.0, 0.3, 1.0), seeded(5)
    x = torch.randn(4, 2, generator=draws, dtype=F64)
    for start, stop in ((0.0, 0.3), (0.3, 1.0)):
        t = torch.tensor(start, dtype=F64)
        v, at = flow.field(t, x), t.clamp(0.01, 0.99)
        score = converted(
            flow.field(at, x), "velocity", "score", x, at, cnf.matching.PATHS.build("linear")
        )
        g = math.sqrt(2 * 0.7 * (1 - start))
        dw = torch.randn(4, 2, generator=draws, dtype=F64)
        h = stop - start
        x = x + h * (v + g**2 / 2 * score) + g * math.sqrt(h) * dw
    found = sde(flow, 4, noise=0.7, grid=grid, generator=seeded(5))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_samples_of_the_sde_are_in_data_space():
    standardize = Standardize((2,)).double()
    flow, _ = gaussian_flow("velocity, linear", preprocess=standardize)
    standardize.loc.fill_(10.0)
    standardize.scale.fill_(3.0)
    x = sde(flow, 10_000, steps=100, generator=seeded())
    assert_law(x, 10 + 3 * M, 3 * S, 0.1)
    flow.dequantization = Rounded()
    rounded = sde(flow, 10_000, steps=100, generator=seeded())
    assert rounded.dtype == torch.int64 and torch.equal(rounded, x.floor().long())


def test_sde_accepts_shapes_context_and_generator_like_sample(small_flow, generator):
    flow = small_flow("cnf", context=3, solver=Solver("euler", steps=5))
    context = torch.randn(4, 3, generator=generator, dtype=F64)
    before = torch.get_rng_state()
    first, again = (sde(flow, (2, 3), context, steps=5, generator=seeded(1)) for _ in range(2))
    assert first.shape == (2, 3, 4, 2) and torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert sde(flow, (), context[0], steps=2).shape == (2,)
    ode = sde(flow, 3, context, steps=5, noise=0, generator=seeded(2))
    expected = flow.sample(3, context, generator=seeded(2))
    torch.testing.assert_close(ode, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 3\), got None"):
        sde(flow, 3)
    with pytest.raises(TypeError, match="sde: expected a flow whose transform is a Continuous"):
        sde(cnf.models.build("realnvp", dim=2), 3)


@pytest.mark.parametrize("layers", [1, 2])
def test_sde_of_a_guided_flow_is_guided(layers, small_flow, generator):
    flow = small_flow("cnf", context=2, null_context=True, layers=layers)
    context = torch.randn(2, generator=generator, dtype=F64)
    draws = {
        weight: sde(guided(flow, weight), 3, context, steps=4, generator=seeded())
        for weight in (0.0, 1.0, 3.0)
    }
    plain = sde(flow, 3, context, steps=4, generator=seeded())
    free = sde(flow, 3, torch.full((2,), math.nan, dtype=F64), steps=4, generator=seeded())
    torch.testing.assert_close(draws[1.0], plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(draws[0.0], free, rtol=0, atol=1e-12)
    assert (draws[3.0] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["predicts", "head"])
def test_sde_under_guidance_uses_the_path_of_the_field(kind, randomized):
    networks = [NullContext(MLPField(2, (5,), 2)) for _ in range(2)]
    field = Predicts(networks[0], "x1", "vp") if kind == "predicts" else WithScore(*networks)
    flow = randomized(Flow(None, Continuous(field), event_shape=(2,)))
    context = torch.ones(2, dtype=F64)
    found = sde(guided(flow, 1.0), 3, context, steps=20, generator=seeded())
    expected = sde(flow, 3, context, steps=20, generator=seeded())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"noise": -1.0}, {"steps": 0}, {"grid": (0.0, 0.5)}, {"grid": (0.0, 0.6, 0.5, 1.0)}],
    ids=str,
)
def test_settings_out_of_range_are_refused(options):
    flow, _ = gaussian_flow("velocity, linear")
    with pytest.raises(ValueError, match="sde"):
        sde(flow, 3, **options)


def test_guided_flow_has_a_guided_field(small_flow):
    flow = small_flow("rnode", context=2, null_context=True)
    field = guided(flow, 2.0, (0.1, 0.6)).field
    assert isinstance(field, Guided) and field.field is flow.field
    assert (field.weight, field.interval) == (2.0, (0.1, 0.6))
