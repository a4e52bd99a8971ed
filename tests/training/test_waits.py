"""Steps in which the host waits for no value of the device, so that a graph may replay them."""

import pytest
import torch

import cnf
from cnf.fields import MLPField, Predicts, WithScore
from cnf.objectives import Joint, MultiscaleMatching
from cnf.registry import options_of
from cnf.training.capture import CapturedLearner
from cnf.transforms import Continuous
from tests.pretended import DEVICE, capturing, launch_fabric

RK4 = cnf.Solver("rk4", steps=2)
DISCRETE = [
    name
    for name in cnf.models.MODELS.taking("dim")
    if "solver" not in options_of(cnf.models.MODELS[name])
]


def flow_of(field):
    return cnf.Flow(cnf.distributions.StandardNormal((2,)), Continuous(field, RK4))


def field(**options):
    return MLPField(2, (4,), **options)


def model(name="cnf", **options):
    if "hidden" in options_of(cnf.models.MODELS[name]):
        options.setdefault("hidden", (4,))
    return lambda: cnf.models.build(name, **{"dim": 2, **options})


def matching(**options):
    return lambda: cnf.FlowMatching(**options)


def likelihood(**options):
    return lambda: cnf.MaximumLikelihood(**{"solver": RK4, **options})


def pictures(name, **options):
    common = {"shape": (1, 4, 4), "dequantization": "uniform", "preprocess": "logit"}
    return lambda: cnf.models.build(name, **common, **options)


STEPS = {
    **{f"path {name}": (model(), matching(path=name)) for name in cnf.matching.PATHS},
    "path geodesic": (lambda: cnf.models.sphere(hidden=(4,)), matching()),
    "path circular": (lambda: cnf.models.torus(2, hidden=(4,)), matching()),
    **{f"times {name}": (model(), matching(times=name)) for name in cnf.matching.TIMES},
    **{
        f"predicts {target}, weighting {weighting}": (
            lambda target=target: flow_of(Predicts(field(), target, path="vp")),
            matching(weighting=weighting),
        )
        for target in ("x1", "noise", "score")
        for weighting in ("target", "velocity")
    },
    "a score head": (lambda: flow_of(WithScore(field(), field())), matching()),
    "layers": (model("ffjord"), matching()),
    "a potential": (model("otflow"), matching()),
    "a context left out": (
        model(context=2, null_context=True),
        matching(context_dropout=0.5),
    ),
    **{
        f"likelihood, {method}": (model(), likelihood(solver=cnf.Solver(method, steps=2)))
        for method in ("euler", "midpoint", "heun2", "heun3", "rk4")
    },
    "likelihood, hutchinson": (model(), likelihood(divergence="hutchinson")),
    "likelihood, a context": (model(context=2), likelihood()),
    "likelihood, blocks": (model("ffjord", layers=2), likelihood()),
    "likelihood, kinetic energy": (model("rnode"), likelihood()),
    "likelihood, HJB": (model("otflow"), likelihood()),
    "both": (model(), lambda: Joint((cnf.FlowMatching(), cnf.MaximumLikelihood(solver=RK4)))),
    **{name: (model(name), likelihood(solver=None)) for name in DISCRETE},
    "nsf, a context": (model("nsf", context=2), likelihood(solver=None)),
    "glow of pictures": (pictures("glow", hidden=(4, 4), layers=2), likelihood(solver=None)),
    "ffjord of pictures": (pictures("ffjord", hidden=(4,)), likelihood(divergence="hutchinson")),
    "scales": (pictures("ffjord", hidden=(4,)), MultiscaleMatching),
    "unet": (pictures("unet", width=8, scales=(1,), blocks=1), matching()),
}


def ready(case, rows=8, **settings):
    """A learner on the pretended device, and a function that prepares the rows of a step."""
    build, objective = STEPS[case]
    flow = build().to(DEVICE)
    config = cnf.TrainConfig(device=DEVICE.type, progress=False, **settings)
    learner = CapturedLearner(flow, objective(), config, launch_fabric(config, torch.float32))
    x = torch.rand(rows, *flow.event_shape).mul(255).round()
    batch = cnf.Batch(
        (torch.nn.functional.normalize(x) if case == "path geodesic" else x).to(DEVICE),
        torch.randn(rows, flow.context_dim).to(DEVICE) if flow.context_dim else None,
    )
    learner.initialize(batch, torch.Generator())
    learner.begin(learner.objective.begin(flow, lambda n: batch, torch.Generator()))
    generator = torch.Generator(DEVICE)
    for _ in range(4):  # dequantization looks at the pixels of the calls 1, 2, 4, 8, …
        learner.prepare(batch, generator)
    return learner, lambda: learner.prepare(batch, generator)[0]


@pytest.mark.parametrize("case", STEPS)
def test_the_host_waits_for_nothing_in_a_step_that_may_be_captured(case, pretended):
    assert STEPS[case][1]().capturable
    learner, prepare = ready(case)
    learner._update(prepare())  # in the first step optimizers allocate their state
    pretended.forget()
    prepared = prepare()
    with capturing():
        learner._update(prepared)
    assert pretended.waits == []
    assert pretended.kernels.total() > 40


@pytest.mark.parametrize("case", ["path linear", "likelihood, rk4"])
def test_the_host_waits_for_nothing_in_a_step_of_parts(case, pretended):
    learner, prepare = ready(case, accumulate=2)
    prepared = prepare()
    pretended.forget()
    with capturing():
        learner._update(prepared)
    assert pretended.waits == []


def test_the_host_waits_for_nothing_while_a_fitted_coupling_pairs(pretended):
    flow, batch = model()().to(DEVICE), cnf.Batch(torch.randn(64, 2).to(DEVICE))
    objective = cnf.FlowMatching(coupling={"name": "semidiscrete", "steps": 4})
    objective = objective.begin(flow, lambda n: batch, torch.Generator())
    pretended.forget()
    objective.prepare(flow, batch, torch.Generator(DEVICE))
    assert pretended.waits == []


@pytest.mark.parametrize("name", cnf.data.TOYS)
def test_the_host_waits_for_nothing_while_a_toy_draws(name, pretended):
    toy, generator = cnf.data.toy(name), torch.Generator(DEVICE)
    toy.sample(8, generator)  # its tables are copied once
    pretended.forget()
    toy.sample(8, generator)
    assert pretended.waits == []


@pytest.mark.parametrize("data", ["a toy", "a table", "a table with weights"])
@pytest.mark.parametrize("objective", ["flow-matching", "maximum-likelihood"])
def test_fit_waits_at_most_once_for_a_step(objective, data, pretended, monkeypatch):
    monkeypatch.setattr("cnf.training.loop.RECORDS", 1)  # what is logged is read
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    given = cnf.data.toy("moons") if data == "a toy" else rows
    weight = torch.ones(64) if data == "a table with weights" else None

    def waits(steps):
        flow = model("cnf" if objective == "flow-matching" else "realnvp")()
        config = cnf.TrainConfig(
            steps=steps, batch_size=8, device=DEVICE.type, progress=False, validations=0,
            validation_rows=16,
        )  # fmt: skip
        pretended.forget()
        cnf.fit(flow, objective, given, config, weight=weight)
        return pretended.waits

    waits(1)  # a toy copies its tables once
    assert len(waits(6)) - len(waits(2)) <= 4


def test_a_step_whose_length_is_drawn_claims_no_capture(pretended):
    objective = cnf.MaximumLikelihood(steer=0.5)
    assert not objective.capturable and not Joint((cnf.FlowMatching(), objective)).capturable
    flow, batch = model(solver=RK4)().to(DEVICE), cnf.Batch(torch.randn(8, 2).to(DEVICE))
    prepared = objective.prepare(flow, batch, torch.Generator(DEVICE))
    pretended.forget()
    with capturing():
        objective(flow, prepared)
    assert [wait.split(":")[0] for wait in pretended.waits] == ["copy in likelihood.py"]


def test_a_step_that_reads_its_loss_is_found(pretended):
    class Wrong(cnf.FlowMatching):
        def __call__(self, module, batch, generator=None):
            loss = super().__call__(module, batch, generator)
            return loss if loss.value.item() else loss

    flow, batch = model()().to(DEVICE), cnf.Batch(torch.randn(8, 2).to(DEVICE))
    objective = Wrong()
    prepared = objective.prepare(flow, batch, torch.Generator(DEVICE))
    pretended.forget()
    objective(flow, prepared).value.backward()
    assert [wait.split(":")[0] for wait in pretended.waits] == [
        "_local_scalar_dense in test_waits.py"
    ]
