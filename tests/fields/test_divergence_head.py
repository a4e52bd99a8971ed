"""The head of a flow map, against dx/dt = -x², whose average divergence has a closed form."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

import cnf
from cnf.dynamics import Solver
from cnf.fields import FlowMap, MLPField, NullContext, VectorField
from cnf.matching.paths import PathSample
from cnf.objectives import MeanFlow, SelfDistillation, Shortcut
from cnf.objectives.flow_map import TimedPairs, _divergence
from cnf.transforms import Continuous

OBJECTIVES = [MeanFlow, SelfDistillation, Shortcut]
F64 = torch.float64


class Decay(VectorField):
    """u = -x²/(1 + x l) over a length l, of each entry; as a head, the average divergence."""

    def __init__(self, head=False):
        super().__init__((3,), 1)
        self.is_head = head

    def forward(self, t, x, context=None):
        length = context[..., -1:]
        if not self.is_head:
            return -x.square() / (1 + x * length)
        short = length.abs() < 1e-9
        safe = torch.where(short, 1.0, length)
        return torch.where(short, -2 * x, -2 * torch.log1p(x * safe) / safe)


def exact_map():
    return FlowMap(Decay(), Decay(head=True)).double()


def points(n=5):
    return 0.1 + 0.3 * torch.rand(n, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def small_flow(**options):
    torch.manual_seed(0)
    options = {"hidden": (16,), "flow_map": True, "divergence_head": True, **options}
    return cnf.models.cnf(2, **options).double()


def data(n=64, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("explicit", ["sample", "density"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_estimate_of_the_exact_head_is_the_log_determinant(steps, explicit):
    ode = Continuous(exact_map(), Solver("flow-map", steps=steps, explicit=explicit))
    z = points()
    x = z / (1 + z)
    ladj = -2 * torch.log1p(z).sum(-1)
    for towards, start, stop, sign in (("data", z, x, 1), ("base", x, z, -1)):
        found = ode.integrate(start, towards=towards, divergence="learned")
        torch.testing.assert_close(found.value, stop)
        torch.testing.assert_close(found.ladj, sign * ladj)
        assert found.nfe == steps and found.estimates is None


def test_unequal_steps_and_integrands_are_taken_along():
    def length_of_time(point):
        return torch.full_like(point.x[:, 0], 2.0)

    ode = Continuous(exact_map(), Solver("flow-map", grid=(0, 0.1, 1)))
    z = points()
    found = ode.integrate(
        z / (1 + z), towards="base", divergence="learned", integrands=(length_of_time,)
    )
    torch.testing.assert_close(found.ladj, 2 * torch.log1p(z).sum(-1))
    torch.testing.assert_close(found.integrals[0], torch.full((5,), 2.0, dtype=F64))


def test_an_ode_solver_integrates_the_head_at_one_time():
    ode = Continuous(exact_map(), Solver("dopri5", rtol=1e-9, atol=1e-9), divergence="learned")
    z = points()
    x, ladj = ode(z)
    torch.testing.assert_close(x, z / (1 + z))
    torch.testing.assert_close(ladj, -2 * torch.log1p(z).sum(-1))


def test_log_prob_is_exact_unless_the_estimate_is_asked_for():
    flow = small_flow()
    x = data(20)
    exact, learned = flow.log_prob(x), flow.log_prob(x, divergence="learned")
    torch.testing.assert_close(flow.log_prob(x, divergence="exact"), exact, rtol=0, atol=0)
    assert ((exact - learned).abs() > 1e-3).all()
    with torch.no_grad():
        for parameter in flow.field.head.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(flow.log_prob(x), exact, rtol=0, atol=0)
    assert ((flow.log_prob(x, divergence="learned") - learned).abs() > 1e-3).all()


def test_a_context_reaches_the_head_and_may_be_missing():
    field = NullContext(
        FlowMap(MLPField(2, (8,), context_dim=3), MLPField(2, (8,), context_dim=3))
    ).double()
    torch.nn.init.normal_(field.null)
    x, start, own = data(5), torch.tensor(0.25, dtype=F64), torch.ones(5, 2, dtype=F64)
    length = torch.full((5, 1), 0.5, dtype=F64)
    for context, given in ((None, field.null.expand(5, 2)), (own, own)):
        expected = field.field.head(start, x, torch.cat([given, length], -1)).sum(-1)
        found = field.until(0.75).average_divergence(start, x, context)
        torch.testing.assert_close(found, expected)
    flow = small_flow(context=1, null_context=True)
    given = torch.stack(
        [flow.log_prob(data(5), c * own[:, :1], divergence="learned") for c in (1, 2)]
    )
    assert (given[0] != given[1]).all()
    assert flow.log_prob(data(5), divergence="learned").isfinite().all()


def test_a_saved_head_is_loaded(tmp_path):
    flow, x = small_flow(), data(5)
    cnf.save(flow, tmp_path / "flow")
    loaded = cnf.load(tmp_path / "flow")
    estimates = [each.log_prob(x, divergence="learned") for each in (flow, loaded)]
    torch.testing.assert_close(*estimates, rtol=0, atol=0)
    assert any(name.startswith("transform.field.head.") for name in flow.state_dict())


@torch.no_grad()
def test_compiled_steps_give_the_same_estimate(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flow, x = small_flow(hidden=(4,), fourier=0), data(5)
    compiled = flow.with_solver(Solver("flow-map", steps=2, compile=True))
    plain = flow.with_solver(Solver("flow-map", steps=2))
    counters.clear()
    found = compiled.log_prob(x, divergence="learned")
    torch.testing.assert_close(found, plain.log_prob(x, divergence="learned"))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


ONE_STEP = cnf.TrainConfig(steps=1, batch_size=16, validations=0, progress=False)


def test_training_that_leaves_the_head_behind_is_told():
    with pytest.warns(UserWarning, match="not its divergence head, which will no longer fit"):
        cnf.fit(small_flow(), cnf.MaximumLikelihood(), data(64), ONE_STEP)
    with pytest.warns(UserWarning, match="neither its steps nor its head"):
        cnf.fit(small_flow(), cnf.FlowMatching(), data(64), ONE_STEP)


@pytest.mark.parametrize("objective", [MeanFlow, SelfDistillation, Shortcut])
def test_what_trains_the_steps_and_the_head_warns_of_nothing(objective):
    coupling = {"name": "semidiscrete", "rows": 64}
    cnf.fit(small_flow(), objective(coupling=coupling), data(64), ONE_STEP)  # warnings are errors


def test_check_asks_no_gradient_of_the_head_and_tells_an_estimate_that_was_not_asked_for():
    flow = small_flow()
    assert cnf.check(flow, n=16)["gradients"].passed
    flow.transform.divergence = "learned"
    assert "an estimate (Learned)" in str(cnf.check(flow, n=16)["determinism"])


def test_what_has_no_head_is_refused_in_words():
    x = data(3)
    for flow in (small_flow(divergence_head=False), cnf.models.cnf(2, hidden=(8,)).double()):
        with pytest.raises(TypeError, match="expected a cnf.fields.FlowMap with a head"):
            flow.log_prob(x, divergence="learned")
    guided = cnf.sampling.guided(small_flow(context=1, null_context=True), 2.0)
    with pytest.raises(TypeError, match="got a Guided without one"):
        guided.log_prob(x, torch.ones(3, 1, dtype=F64), divergence="learned")
    steps = small_flow().with_solver(Solver("rk4", steps=2, discrete=True))
    with pytest.raises(ValueError, match=r"'learned' is for flow maps"):
        steps.log_prob(x, divergence="learned")
    with pytest.raises(ValueError, match="head of the field's event shape and context size"):
        FlowMap(MLPField(2, (8,), context_dim=1), MLPField(2, (8,)))
    with pytest.raises(ValueError, match="flow_map=True where divergence_head=True"):
        cnf.models.cnf(2, divergence_head=True)
    with pytest.raises(ValueError, match=r"MaximumLikelihood.*train the head"):
        cnf.fit(small_flow(), cnf.MaximumLikelihood("learned"), data(64), ONE_STEP)


def test_the_head_is_regressed_on_the_divergence_along_the_path():
    """Of dx/dt = -x² it is -2 Σ x/(1 + x l) after a length l, whatever a map that learns says."""

    class Learning(Decay):
        def forward(self, t, x, context=None):
            return -x.square() + 5 * context[..., -1:]

    x = points()
    t = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0], dtype=F64)
    probe = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(1)).double()
    errors = []
    for share in (1.0, 0.5):  # of the way; the two midpoint steps there are of second order
        r = t + share * torch.tensor([0.6, -0.7, 0.0, 1.0, -1.0], dtype=F64)
        rows = TimedPairs(x, x, t, s=r, r=r, probe=2 * probe - 1)
        found = _divergence(FlowMap(Learning()), PathSample(t, x, x), rows)
        expected = (-2 * x / (1 + x * (r - t)[:, None])).sum(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
        errors.append((found - expected).abs().max())
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_times_are_between_those_of_the_map(objective):
    flow, batch = small_flow(), cnf.Batch(data(256))
    rows = objective().prepare(flow, batch, torch.Generator().manual_seed(3))
    part = ((rows.r - rows.t) / (rows.s - rows.t))[rows.s != rows.t]
    assert (part >= 0).all() and (part <= 1).all()
    assert abs(part.mean() - 0.5) < 0.1 and abs(part.std() - 12**-0.5) < 0.05
    assert (rows.r == rows.t)[rows.s == rows.t].all()
    assert (rows.probe.abs() == 1).all() and rows.probe.shape == (256, 2)
    plain = objective().prepare(
        small_flow(divergence_head=False), batch, torch.Generator().manual_seed(3)
    )
    assert plain.r is None and plain.probe is None
    torch.testing.assert_close(plain.s, rows.s)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_head_leaves_the_gradient_of_the_velocity_as_it_is(objective):
    flow = small_flow(context=1, context_preprocess=None)
    plain = small_flow(context=1, context_preprocess=None, divergence_head=False)
    context = torch.ones(64, 1, dtype=F64, requires_grad=True)  # of a net that is trained, too
    plain.load_state_dict(
        {name: value for name, value in flow.state_dict().items() if ".head." not in name}
    )
    gradients, losses = [], []
    for each in (flow, plain):
        batch = cnf.Batch(data(), context)
        rows = objective().prepare(each, batch, torch.Generator().manual_seed(3))
        losses.append(objective()(each, rows))
        own = [context, *each.field.field.parameters()]
        gradients.append(torch.autograd.grad(losses[-1].value, own))
    torch.testing.assert_close(*gradients)
    told, bare = (loss.metrics for loss in losses)
    assert told.keys() - bare.keys() == {"divergence_error"} and told["divergence_error"] > 0
    torch.testing.assert_close(losses[0].value, bare["map"] + told["divergence_error"])


def test_the_gradient_of_the_head_is_that_of_finite_differences():
    flow, objective = small_flow(context=1), SelfDistillation(power=0.5)
    batch = cnf.Batch(data(), torch.ones(64, 1, dtype=F64))
    rows = objective.prepare(flow, batch, torch.Generator().manual_seed(3))
    loss = SelfDistillation()(flow, rows)
    weight = flow.field.head.layers[-1].weight
    (gradient,) = torch.autograd.grad(loss.value, weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight.add_(step * direction)
            values.append(SelfDistillation()(flow, rows).value)
    slope = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)
    weighted = [each / (each + 1e-3).sqrt() for each in objective._errors(flow, rows).values()]
    torch.testing.assert_close(objective.per_row(flow, rows), weighted[0] + weighted[1])
    torch.testing.assert_close(objective.per_row(flow, rows).mean(), objective(flow, rows).value)


def test_it_learns_the_trace_of_a_linear_ode():
    """Of dx/dt = 2t A x, whose average divergence is tr A (s + t)."""

    class Shear(VectorField):
        def __init__(self):
            super().__init__((2,), 1)

        def forward(self, t, x, context=None):
            length = context[..., -1:]
            start = t.reshape(-1, 1)
            time = 2 * start * length + length**2
            short = length.abs() < 1e-9
            safe = torch.where(short, 1.0, length)
            stretched = torch.stack([x[:, 0] + time[:, 0] * x[:, 1], x[:, 1]], -1)
            velocity = torch.stack([0.5 * x[:, 0] + x[:, 1], 0.5 * x[:, 1]], -1)
            long = (torch.exp(0.5 * time) * stretched - x) / safe
            return torch.where(short, 2 * start * velocity, long)

    torch.manual_seed(0)
    field = FlowMap(Shear(), MLPField(2, (16,), context_dim=1)).double()
    flow = cnf.Flow(None, Continuous(field, Solver("flow-map", steps=2)), event_shape=(2,))
    adam = torch.optim.Adam(flow.double().parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(300):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        adam.zero_grad()
        SelfDistillation()(flow, cnf.Batch(data(256)), generator).value.backward()
        adam.step()
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.4], dtype=F64)
    s = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.4], dtype=F64)
    found = field.until(s).average_divergence(t, data(5))
    assert (found - (s + t)).abs().max() < 0.2, found - (s + t)
    with torch.no_grad():
        x = data(20)
        error = flow.log_prob(x, divergence="learned") - flow.log_prob(x)
    assert error.square().mean().sqrt() < 0.1, error


def test_the_path_to_the_divergence_has_the_velocities_of_its_times():
    """Along dx/dt = t² x two midpoint steps from t = 0 to r = 1; its divergence tells x_r."""

    class Growth(VectorField):
        def __init__(self):
            super().__init__((1,), 0)

        def forward(self, t, x, context=None):
            t = torch.as_tensor(t).reshape(-1, *[1] * (x.dim() - 1))
            return t.square() * x + torch.where(t == 1, 0.5 * x.square(), 0.0)

    x = points()[:, :1]
    t, one = torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64)
    rows = TimedPairs(x, x, t, s=one, r=one, probe=torch.ones_like(x))
    found = _divergence(Growth(), PathSample(t, x, x), rows)
    end = x
    for start in (0.0, 0.5):
        middle = end + 0.25 * start**2 * end
        end = end + 0.5 * (start + 0.25) ** 2 * middle
    torch.testing.assert_close(found, 1 + end[:, 0])
