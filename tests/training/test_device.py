"""Training on a device other than the CPU."""

import pytest
import torch

import cnf
from cnf.registry import options_of


@pytest.mark.filterwarnings("ignore:.*did not converge:UserWarning")
@pytest.mark.parametrize("coupling", cnf.matching.COUPLINGS)
def test_flow_matching_trains(coupling, config, small, points, device):
    flow, settings = small(), config(device=device.type, steps=2, validations=0)
    if coupling == "semidiscrete":
        coupling = {"name": coupling, "steps": 10}
    history = cnf.fit(flow, cnf.FlowMatching(coupling=coupling), points, settings)
    assert (history.steps, history.skipped) == (2, 0)
    assert torch.isfinite(flow.log_prob(points.to(device))).all()


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
def test_likelihood_with_the_adjoint_trains(name, divergence, config, small, device):
    solved = "solver" in options_of(cnf.models.MODELS[name])
    options = {"solver": cnf.Solver("rk4", steps=2, gradient="adjoint")} if solved else {}
    flow, toy = small(name, **options), cnf.data.toy("moons")
    if not options and divergence != "exact":
        pytest.skip("no ODE, no divergence")
    objective = cnf.MaximumLikelihood(divergence=divergence)
    settings = config(device=device.type, steps=2, validations=0)
    history = cnf.fit(flow, objective, toy, settings)
    assert (history.steps, history.skipped) == (2, 0)
    assert all(p.device == device and p.dtype == torch.float32 for p in flow.parameters())
    assert torch.isfinite(flow.log_prob(toy.sample(100).to(device))).all()


def test_a_checkpoint_loads_on_the_cpu(config, small, points, tmp_path, device):
    flow = small()
    settings = config(device=device.type, steps=2, validations=0, folder=tmp_path / "run")
    cnf.fit(flow, cnf.FlowMatching(), points, settings)
    read = cnf.load(tmp_path / "run")
    assert all(p.device.type == "cpu" for p in read.parameters())
    expected = flow.log_prob(points.to(device)).cpu()
    torch.testing.assert_close(read.log_prob(points), expected, rtol=1e-4, atol=1e-4)


VARIANTS = {
    "weights": (cnf.MaximumLikelihood, {"weight": torch.ones(100)}, {}),
    "weights of pairs": (
        lambda: cnf.FlowMatching(coupling="minibatch-ot"),
        {"weight": torch.ones(100)},
        {},
    ),
    "steer": (lambda: cnf.MaximumLikelihood(steer=0.3), {}, {}),
    "joint": (cnf.objectives.Joint, {}, {}),
    "parts": (cnf.FlowMatching, {}, {"accumulate": 2}),
    "bfloat16": (cnf.FlowMatching, {}, {"precision": "bf16-mixed"}),
    "patience": (cnf.FlowMatching, {}, {"patience": 2, "validations": 3}),
    "standardized": (cnf.FlowMatching, {"preprocess": "standardize"}, {}),
}


@pytest.mark.filterwarnings("ignore:fit. early stopping keeps the weights")  # of six steps
@pytest.mark.parametrize("case", VARIANTS)
def test_fit_trains_in_every_way(case, config, small, points, device):
    objective, given, settings = VARIANTS[case]
    options = {name: given[name] for name in given if name == "preprocess"}
    weight = given.get("weight")
    flow = small(**options)
    settings = {"validations": 1, **settings}
    history = cnf.fit(
        flow, objective(), points, config(device=device.type, **settings), weight=weight
    )
    assert history.steps > 0 and history.skipped == 0


@pytest.mark.parametrize("coupling", ["conditional-ot", "independent"])
def test_a_context_trains(coupling, config, small, points, device):
    flow, settings = small(context=1), config(device=device.type, validations=0)
    objective, context = cnf.FlowMatching(coupling=coupling), points[:, :1].abs()
    history = cnf.fit(flow, objective, points, settings, context=context)
    assert (history.steps, history.skipped) == (6, 0)


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: list(x.split(16)),
        lambda x: torch.utils.data.TensorDataset(x),
        lambda x: x.double().numpy(),
        lambda x: torch.distributions.Independent(torch.distributions.Normal(x[0], x[0].abs()), 1),
    ],
    ids=["batches", "a dataset", "an array", "a distribution"],
)
def test_data_of_the_cpu_come_to_the_device(batches, config, small, points, device):
    flow, settings = small("realnvp"), config(device=device.type, validations=0)
    history = cnf.fit(flow, "maximum-likelihood", batches(points), settings)
    assert (history.steps, history.skipped) == (6, 0)
