"""What users call on a device other than the CPU, beside the same flow on the CPU."""

import math
from dataclasses import replace

import pytest
import torch

import cnf
from cnf.cli import main as cli
from cnf.registry import options_of

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PICTURES = {
    "glow": {"hidden": (8, 8), "layers": 2},
    "unet": {"width": 8, "scales": (1, 2), "blocks": 1},
    "ffjord": {"hidden": (4, 4)},
    "rnode": {"hidden": (4, 4)},
    "cnf": {"hidden": (4, 4)},
}
RK4 = cnf.Solver("rk4", steps=4)


@pytest.fixture
def pictures():
    """Pixels of 32 pictures of 1 × 4 × 4, of eight bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (32, 1, 4, 4), generator=generator, dtype=torch.uint8)


def picture_flow(name, **options):
    if "solver" in options_of(cnf.models.MODELS[name]):
        options["solver"] = cnf.Solver("midpoint", steps=1)
    return cnf.models.build(
        name, shape=(1, 4, 4), dequantization="uniform", preprocess="logit",
        **PICTURES[name], **options,
    )  # fmt: skip


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
def test_a_flow_gives_the_densities_that_it_gives_on_the_cpu(name, context, small_flow, device):
    flow, x = small_flow(name, context, 3, RK4), torch.randn(20, 3).double()
    c = torch.randn(20, context).double() if context else None
    expected = flow.log_prob(x, context=c).detach()
    flow.to(device)
    c = None if c is None else c.to(device)
    found = flow.log_prob(x.to(device), context=c)
    assert found.device == device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    drawn, log_prob = flow.sample_and_log_prob(5, context=None if c is None else c[:5])
    assert drawn.device == device and torch.isfinite(log_prob).all()


@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
def test_a_generator_of_the_cpu_draws_the_samples_of_the_cpu(name, small_flow, device):
    flow = small_flow(name, dim=2, solver=RK4)
    expected = flow.sample(6, generator=torch.Generator().manual_seed(1))
    found = flow.to(device).sample(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_a_generator_of_the_device_repeats_its_samples(small_flow, device):
    flow = small_flow("realnvp").to(device)
    first, second = (
        flow.sample(6, generator=torch.Generator(device).manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *((name, "likelihood") for name in ("glow", "ffjord", "rnode", "cnf")),
        *((name, "flow-matching") for name in ("unet", "cnf")),
        ("ffjord", "multiscale-matching"),
        pytest.param("unet", "likelihood", marks=pytest.mark.slow),
    ],
)
def test_a_model_of_pictures_trains_and_counts_bits(name, objective, pictures, device):
    flow = picture_flow(name)
    if objective == "likelihood":
        objective = cnf.MaximumLikelihood(divergence="hutchinson")
    config = cnf.TrainConfig(
        steps=3, batch_size=8, device=device.type, progress=False, validations=0
    )
    history = cnf.fit(flow, objective, pictures, config)
    assert (history.steps, history.skipped) == (3, 0)
    divergence = None if name == "glow" else "hutchinson"
    bits = cnf.metrics.bits_per_dim(flow, pictures[:4], divergence=divergence)
    assert 0 < bits.value < 20
    assert flow.sample(2).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("preprocess", ["standardize", "whiten", ["whiten", "radial"]])
def test_a_table_trains_on_the_device(preprocess, config, device):
    rows = torch.randn(600, 4).double() @ torch.randn(4, 4).double()
    flow = cnf.models.nsf(4, hidden=(8,), layers=2, preprocess=preprocess)
    history = cnf.fit(flow, "maximum-likelihood", rows, config(device=device.type))
    assert history.steps == 6 and math.isfinite(history.column("val_nll")[-1])
    assert torch.isfinite(flow.log_prob(rows.float().to(device))).all()


def test_a_killed_run_goes_on_as_if_it_had_not_been(config, tmp_path, device):
    def flow():
        torch.manual_seed(0)
        return cnf.models.cnf(2, hidden=(8, 8), solver=RK4)

    data = torch.randn(200, 2)
    whole, half = flow(), flow()
    settings = config(
        device=device.type, steps=14, validations=0
    )  # on CUDA three come before the capture
    cnf.fit(whole, "flow-matching", data, settings)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 7:
            raise Stop

    folder = tmp_path / "run"
    with pytest.raises(Stop):
        cnf.fit(half, "flow-matching", data, replace(settings, folder=folder), callbacks=[stop])
    again = flow()
    cnf.fit(again, "flow-matching", data, replace(settings, folder=folder, resume=True))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_are_those_of_the_cpu(method, gradient, small_flow, device):
    precision = {"steps": 4} if method == "rk4" else {"rtol": 1e-4, "atol": 1e-4}
    solver = cnf.Solver(method, gradient=gradient, **precision)
    flow, x = small_flow("cnf", solver=solver), torch.randn(10, 2).double()

    def gradients():
        flow.zero_grad()
        device = next(flow.parameters()).device
        cnf.MaximumLikelihood()(flow, cnf.Batch(x.to(device))).value.backward()
        return [p.grad.cpu().clone() for p in flow.field.parameters()]

    expected = gradients()
    flow.to(device)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_race_is_judged_on_the_device(device):
    continuous = cnf.models.cnf(2, hidden=(4,), frequencies=0, fourier=0)
    discrete = cnf.models.realnvp(2, hidden=(4,), layers=2)
    contestants = [
        ("matched", continuous, cnf.FlowMatching()),
        ("coupled", discrete, cnf.MaximumLikelihood()),
    ]
    settings = {"steps": 5, "progress": False, "test_points": 50, "w2_points": 20}
    results = cnf.compare("moons", contestants, device=device.type, **settings)
    assert all(math.isfinite(entry.score("gap")) for entry in results.entries)


class TestTheCommandLineOnCuda:
    pytestmark = needs_cuda

    def test_a_race_runs_to_its_page(self, tmp_path):
        names = "cnf-flow-matching,cnf-likelihood,realnvp"
        options = ["--contestants", names, "--steps", "20", "--w2_points", "200"]
        cli(["compare", "moons", *options, "--device", "cuda", "--folder", str(tmp_path / "race")])
        assert list((tmp_path / "race").glob("report.html"))

    def test_it_trains_evaluates_and_samples(self, tmp_path):
        run = str(tmp_path / "run")
        options = ["--model", "realnvp", "--steps", "20", "--device", "cuda", "--folder", run]
        cli(["train", "moons", *options])
        cli(["evaluate", run, "--points", "100"])
        cli(["sample", run, str(tmp_path / "rows.csv"), "--n", "10"])
        assert len((tmp_path / "rows.csv").read_text().splitlines()) >= 10


def test_metrics_take_flows_and_points_on_the_device(small_flow, device):
    flow = small_flow("realnvp").float().to(device)
    x, metrics = flow.sample(200), cnf.metrics
    assert math.isfinite(metrics.nll(flow, x).value)
    assert math.isfinite(metrics.gap(flow, cnf.data.toy("8gaussians"), x).value)
    assert metrics.round_trip_error(flow, x) < 1e-2
    for distance in (metrics.wasserstein2, metrics.sliced_wasserstein2, metrics.mmd):
        assert math.isfinite(distance(x[:50], flow.sample(50)))
    assert metrics.energy_distance(x, x, biased=True) == pytest.approx(0, abs=1e-4)


def test_metrics_of_paths_take_a_flow_on_the_device(small_flow, device):
    flow = small_flow("cnf", solver=RK4).to(device)
    assert cnf.metrics.path_energy(flow, 20).value > 0
    assert cnf.metrics.straightness(flow, 20).value > 0
    assert cnf.metrics.nfe(flow).sample == 16


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "heun3", "explicit_adams", "scipy_solver"])
def test_a_solver_gives_what_it_gives_on_the_cpu(method, small_flow, device):
    adaptive = {"rtol": 1e-3, "atol": 1e-3}
    settings = {"steps": 4} if method in ("heun3", "explicit_adams") else adaptive
    flow, x = small_flow("cnf", solver=cnf.Solver(method, **settings)), torch.randn(5, 2).double()
    x[2] = math.nan
    with torch.no_grad():
        expected = flow.log_prob(x)
        found = flow.to(device).log_prob(x.to(device))
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


def test_guided_samples_and_missing_contexts_are_computed_on_the_device(small_flow, device):
    flow = small_flow("cnf", context=2, solver=RK4, null_context=True).to(device)
    c = torch.randn(4, 2).double().to(device)
    assert cnf.sampling.guided(flow, 2.0).sample((), c).device == device
    told = torch.arange(4, device=device)[:, None] < 2
    x = torch.randn(4, 2).double().to(device)
    assert torch.isfinite(flow.log_prob(x, torch.where(told, c, math.nan))).all()


def test_a_mixture_is_fitted_on_the_device(device):
    x = torch.randn(100, 2).to(device)
    mixture = cnf.distributions.GaussianMixture.fit(x, 2, steps=3)
    assert mixture.means.device == device


@pytest.mark.parametrize("name", cnf.data.TOYS)
def test_a_toy_draws_and_scores_on_the_device(name, device):
    toy = cnf.data.toy(name)
    x = toy.sample(50, torch.Generator(device).manual_seed(0))
    found = toy.log_prob(x)
    assert x.device == found.device == device
    torch.testing.assert_close(found.cpu(), toy.log_prob(x.cpu()))


@pytest.mark.parametrize("name", ["normal", "logistic", "mixture", "uniform", "empirical", "toy"])
def test_a_base_draws_and_scores_on_the_device(name, device):
    bases = {
        "normal": lambda: cnf.distributions.StandardNormal((2,)),
        "logistic": lambda: cnf.distributions.StandardLogistic((2,)),
        "mixture": lambda: cnf.distributions.GaussianMixture(torch.eye(2), torch.ones(2, 2)),
        "uniform": lambda: cnf.distributions.Uniform(torch.zeros(2), torch.ones(2)),
        "empirical": lambda: cnf.distributions.Empirical(torch.randn(20, 2)),
        "toy": lambda: cnf.distributions.as_base(cnf.data.toy("moons"), (2,)),
    }
    base = bases[name]().to(device)
    x = base.sample((5,), torch.Generator(device).manual_seed(0))
    assert x.device == base.sample((5,)).device == device
    if name != "empirical":
        assert base.log_prob(x).device == device


def test_a_continuous_flow_samples_in_every_way(small_flow, device):
    flow = small_flow("cnf", solver=RK4).to(device)
    generator = torch.Generator(device).manual_seed(0)
    z = flow.base.sample((4,), generator)
    torch.testing.assert_close(flow.encode(flow.decode(z)), z, rtol=1e-2, atol=1e-2)
    assert flow.trajectory(z, [0.0, 0.5, 1.0]).device == device
    assert flow.distribution().sample((3,)).device == device
    grid = cnf.sampling.edm_grid(3)
    few = flow.with_solver(cnf.Solver("heun2", grid=grid))
    assert all(value.device == device for value in few.sample_and_log_prob(4))
    assert cnf.sampling.sde(flow, 4, steps=3, generator=generator).device == device


def test_a_density_comes_with_error_bars(small_flow, device):
    flow = small_flow("cnf", solver=RK4).to(device)
    told = cnf.metrics.log_prob_with_error(flow, torch.randn(4, 2).double().to(device))
    assert told.value.device == device and torch.isfinite(told.solver_error).all()


def test_a_flow_passes_its_check(small_flow, device):
    report = cnf.check(small_flow("realnvp").to(device))
    assert report.ok, str(report)


def test_reflow_trains_on_the_flow_s_own_pairs(small_flow, config, device):
    flow = small_flow("cnf", solver=RK4).to(device)
    (history,) = cnf.training.reflow(flow, config(device=device.type), n=64)
    assert history.steps == 6
