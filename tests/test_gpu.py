"""What users call on a CUDA device, beside the same flow on the CPU."""

import math
from dataclasses import replace

import pytest
import torch

import cnf
from cnf.cli import main as cli
from cnf.registry import options_of

pytestmark = [
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
    """Pixels of 32 pictures of 1 × 8 × 8, of eight bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (32, 1, 8, 8), generator=generator, dtype=torch.uint8)


def picture_flow(name, **options):
    if "solver" in options_of(cnf.models.MODELS[name]):
        options["solver"] = cnf.Solver("rk4", steps=2)
    return cnf.models.build(
        name, shape=(1, 8, 8), dequantization="uniform", preprocess="logit",
        **PICTURES[name], **options,
    )  # fmt: skip


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
def test_a_flow_gives_the_densities_that_it_gives_on_the_cpu(name, context, small_flow):
    flow, x = small_flow(name, context=context, dim=3), torch.randn(20, 3).double()
    c = torch.randn(20, context).double() if context else None
    expected = flow.log_prob(x, context=c)
    flow.cuda()
    c = None if c is None else c.cuda()
    found = flow.log_prob(x.cuda(), context=c)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    drawn, log_prob = flow.sample_and_log_prob(5, context=None if c is None else c[:5])
    assert drawn.device.type == "cuda" and torch.isfinite(log_prob).all()


@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
def test_a_generator_of_the_cpu_draws_the_samples_of_the_cpu(name, small_flow):
    flow = small_flow(name, dim=2)
    expected = flow.sample(6, generator=torch.Generator().manual_seed(1))
    found = flow.cuda().sample(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_a_generator_of_the_gpu_repeats_its_samples(small_flow):
    flow = small_flow("realnvp").cuda()
    first, second = (
        flow.sample(6, generator=torch.Generator("cuda").manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("objective", ["maximum-likelihood", "flow-matching"])
def test_a_model_of_pictures_trains_and_counts_bits(name, objective, pictures):
    flow = picture_flow(name)
    if objective == "flow-matching" and name not in ("unet", "cnf"):
        pytest.skip("not one field over one time")
    if objective == "maximum-likelihood":
        objective = cnf.MaximumLikelihood(divergence="hutchinson")
    config = cnf.TrainConfig(steps=3, batch_size=8, device="cuda", progress=False, validations=0)
    history = cnf.fit(flow, objective, pictures, config)
    assert (history.steps, history.skipped) == (3, 0)
    bits = cnf.metrics.bits_per_dim(flow, pictures[:4], draws=2)
    assert 0 < bits.value < 20
    assert flow.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("preprocess", ["standardize", "whiten", ["whiten", "radial"]])
def test_a_table_trains_on_the_gpu(preprocess, config):
    rows = torch.randn(600, 4).double() @ torch.randn(4, 4).double()
    flow = cnf.models.nsf(4, hidden=(8,), layers=2, preprocess=preprocess)
    history = cnf.fit(flow, "maximum-likelihood", rows, config(device="cuda"))
    assert history.steps == 6 and math.isfinite(history.column("val_nll")[-1])
    assert torch.isfinite(flow.log_prob(rows.float().cuda())).all()


@pytest.fixture
def config():
    def make(**settings):
        small = {"steps": 6, "batch_size": 16, "validation_rows": 50, "progress": False}
        return cnf.TrainConfig(**{**small, **settings})

    return make


def test_a_killed_run_goes_on_as_if_it_had_not_been(config, tmp_path):
    def flow():
        torch.manual_seed(0)
        return cnf.models.cnf(2, hidden=(8, 8), solver=RK4)

    data = torch.randn(200, 2)
    whole, half = flow(), flow()
    settings = config(device="cuda", steps=14)  # three are launched before a step is captured
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
def test_gradients_are_those_of_the_cpu(method, gradient, small_flow):
    precision = {"steps": 4} if method == "rk4" else {"rtol": 1e-9, "atol": 1e-9}
    solver = cnf.Solver(method, gradient=gradient, **precision)
    flow, x = small_flow("cnf", solver=solver), torch.randn(10, 2).double()

    def gradients():
        flow.zero_grad()
        device = next(flow.parameters()).device
        cnf.MaximumLikelihood()(flow, cnf.Batch(x.to(device))).value.backward()
        return [p.grad.cpu().clone() for p in flow.field.parameters()]

    expected = gradients()
    flow.cuda()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_race_runs_to_its_page(tmp_path):
    names = "cnf-flow-matching,cnf-likelihood,realnvp"
    options = ["--contestants", names, "--steps", "20", "--w2_points", "200"]
    cli(["compare", "moons", *options, "--device", "cuda", "--folder", str(tmp_path / "race")])
    assert list((tmp_path / "race").glob("*.html"))


def test_the_command_line_trains_evaluates_and_samples(tmp_path, capsys):
    run = str(tmp_path / "run")
    options = ["--model", "realnvp", "--steps", "20", "--device", "cuda", "--folder", run]
    cli(["train", "moons", *options])
    cli(["evaluate", run, "--points", "100"])
    cli(["sample", run, str(tmp_path / "rows.csv"), "--n", "10"])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) >= 10


def test_metrics_take_flows_and_points_on_the_gpu(small_flow):
    flow = small_flow("realnvp").float().cuda()
    x = flow.sample(200)
    assert math.isfinite(cnf.metrics.nll(flow, x).value)
    assert cnf.metrics.round_trip_error(flow, x) < 1e-2
    assert cnf.metrics.sliced_wasserstein2(x, flow.sample(200)) >= 0
    assert cnf.metrics.energy_distance(x, x, biased=True) == pytest.approx(0, abs=1e-4)
