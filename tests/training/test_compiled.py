"""Steps on a CPU as one program: what it computes, when it is made, and where it fails."""

import copy
import shutil

import pytest
import torch
from torch import nn

import cnf
from cnf.dynamics import ode
from cnf.objectives import Batch, Objective
from cnf.objectives.base import Loss
from cnf.training import compiled
from cnf.training.compiled import CompiledLearner, CompiledSolveLearner, pays
from cnf.training.flat import FlatAdam
from cnf.training.learner import Learner, _LossModule, launch_fabric
from cnf.training.learners import learner_for
from cnf.training.program import Program, _recorded
from cnf.transforms.continuous import compiled_solves

DISCRETE = ["nice", "realnvp", "glow", "nsf", "nsf-ar", "maf", "planar", "radial", "sylvester"]


@pytest.fixture
def small(small):
    """(name) → the small model of two layers, in float64, with weights that are not its first."""

    def build(name, **options):
        if name == "cnf":
            options = {"hidden": (8, 8), "solver": None, **options}
        else:
            options = {"layers": 2, **options}
        flow, generator = small(name, **options).double(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in flow.parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * draw
        return flow

    return build


def batch(n=16, context=0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    given = torch.randn(n, context, dtype=torch.float64, generator=generator) if context else None
    return Batch(x, given, weight=torch.rand(n, dtype=torch.float64, generator=generator))


def program_of(flow, objective, rows=None, clip=None):
    prepared = objective.prepare(flow, rows or batch(), torch.Generator().manual_seed(2))
    loss, trained = _LossModule(flow, objective, None), list(objective.parameters(flow))
    return loss, trained, prepared, Program(loss, trained, prepared, clip)


def assert_is_the_gradient(loss, trained, rows, program):
    """On other rows and other weights than those of the record."""
    with torch.no_grad():
        for parameter in trained:
            parameter *= 1.1
    rows = rows.map(lambda value: value.flip(0))
    wanted = loss(rows)
    gradient = torch.autograd.grad(wanted.value, trained, allow_unused=True)
    found, norm, side_by_side = program(rows)
    torch.testing.assert_close(found.value, wanted.value.detach())
    assert found.metrics.keys() == wanted.metrics.keys()
    used = [(p, part) for p, part in zip(trained, gradient, strict=True) if part is not None]
    assert {id(p) for p in program.parameters} == {id(p) for p, _ in used}
    whole = torch.cat([dict_of(used)[id(p)].flatten() for p in program.parameters])
    torch.testing.assert_close(side_by_side, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norm, whole.norm())


def dict_of(pairs):
    return {id(parameter): part for parameter, part in pairs}


@pytest.mark.parametrize("name", DISCRETE)
def test_a_record_of_a_discrete_flows_likelihood_is_its_loss_and_gradient(name, small):
    assert_is_the_gradient(*program_of(small(name), cnf.MaximumLikelihood()))


@pytest.mark.parametrize("path", ["linear", "cosine", {"name": "linear", "noise": 0.1}])
@pytest.mark.parametrize("coupling", ["independent", "minibatch-ot"])
def test_a_record_of_flow_matching_is_its_loss_and_gradient(path, coupling, small):
    objective = cnf.FlowMatching(path=path, coupling=coupling)
    assert_is_the_gradient(*program_of(small("cnf"), objective))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ["mean-flow", "self-distillation", "shortcut"])
def test_a_record_of_a_flow_map_is_its_loss_and_gradient(name, head):
    torch.manual_seed(0)
    flow = cnf.models.cnf(2, hidden=(8, 8), flow_map=True, divergence_head=head).double()
    assert_is_the_gradient(*program_of(flow, cnf.objectives.OBJECTIVES[name]()))


def test_a_record_has_the_context_as_an_input(small):
    flow = small("nsf", context=3)
    assert_is_the_gradient(*program_of(flow, cnf.MaximumLikelihood(), batch(context=3)))


class Linear(cnf.fields.VectorField):
    """A field that compiles within seconds."""

    def __init__(self, dropout=0.0):
        super().__init__((2,), 0)
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(dropout)

    def forward(self, t, x, context=None):
        return self.dropout(self.linear(x))


def flow_of(field):
    base = cnf.distributions.StandardNormal((2,))
    return cnf.Flow(base, cnf.transforms.Continuous(field)).double()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_program_is_the_loss_and_gradient():
    loss, trained, rows, program = program_of(flow_of(Linear()), cnf.FlowMatching())
    program.compile()
    assert_is_the_gradient(loss, trained, rows, program)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_program_takes_rows_in_any_order_of_memory():
    """Weights that all are one number share its memory, as `resampled` makes them."""
    rows = cnf.FlowMatching().prepare(flow := flow_of(Linear()), batch(), torch.Generator())
    rows = rows.but(weight=rows.weight[:1].expand(16), x1=rows.x1.T.contiguous().T)
    loss = _LossModule(flow, cnf.FlowMatching(), None)
    program = Program(loss, list(flow.parameters()), rows, None)
    program.compile()
    wanted = loss(rows)
    found, _, gradient = program(rows)
    torch.testing.assert_close(found.value, wanted.value.detach())
    pairs = zip(
        program.parameters,
        gradient.split([p.numel() for p in program.parameters]),
        strict=True,
    )
    for parameter, part in pairs:
        (own,) = torch.autograd.grad(wanted.value, parameter, retain_graph=True)
        torch.testing.assert_close(part.view_as(own), own)


def test_a_weight_that_overlaps_itself_is_not_recorded():
    flow = flow_of(Linear())
    flow.field.linear.weight = nn.Parameter(torch.ones(1, 2, dtype=torch.float64).expand(2, 2))
    with pytest.raises(RuntimeError, match="overlaps itself"):
        program_of(flow, cnf.FlowMatching())


class Scaled(Linear):
    """A field that computes with a tensor and a number that are no buffers."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = torch.ones(2, dtype=torch.float64), 0.0

    def forward(self, t, x, context=None):
        return self.scale * self.linear(x) + torch.tensor([self.shift, 0.0], dtype=x.dtype)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_program_reads_tensors_that_are_no_buffers_at_each_call():
    flow = flow_of(Scaled())
    loss, trained, rows, program = program_of(flow, cnf.FlowMatching())
    program.compile()
    flow.field.scale *= 3
    assert_is_the_gradient(loss, trained, rows, program)


def test_a_frozen_parameter_gets_no_gradient(small):
    flow = small("realnvp")
    frozen = next(flow.parameters()).requires_grad_(False)
    program = program_of(flow, cnf.MaximumLikelihood())[-1]
    assert all(parameter is not frozen for parameter in program.parameters)
    assert len(program.parameters) == len(list(flow.parameters())) - 1


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(clip, small):
    loss, trained, rows, program = program_of(small("realnvp"), cnf.MaximumLikelihood(), clip=clip)
    loss(rows).value.backward()
    norm = nn.utils.clip_grad_norm_(trained, clip)
    _, found, side_by_side = program(rows)
    torch.testing.assert_close(found, norm)
    whole = torch.cat([parameter.grad.flatten() for parameter in program.parameters])
    torch.testing.assert_close(side_by_side, whole)


def test_running_statistics_move_in_a_call_and_not_in_the_record(small):
    flow = small("realnvp", layers=1)
    norm = cnf.transforms.BatchNorm(2).double()
    flow.transform = cnf.transforms.Compose([flow.transform, norm])
    before = norm.mean.clone()
    loss, _, rows, program = program_of(flow, cnf.MaximumLikelihood())
    torch.testing.assert_close(norm.mean, before)
    other = copy.deepcopy(loss)
    other(rows)
    program(rows)
    assert not torch.equal(norm.mean, before)
    torch.testing.assert_close(norm.mean, list(other.module.transform.modules())[-1].mean)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_parameters_side_by_side_move_and_average_as_by_torch(kind, small):
    one, other = small("realnvp"), small("realnvp")
    averages = [copy.deepcopy(flow).requires_grad_(False) for flow in (one, other)]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    adams = [kind(flow.parameters(), **settings) for flow in (one, other)]
    flat = None
    for step in range(4):
        rows = batch().x * step
        for flow, adam in zip((one, other), adams, strict=True):
            adam.zero_grad()
            flow.log_prob(rows).mean().backward()
        if step == 2:  # from the state that torch's Adam has come to
            flat = FlatAdam(adams[1], list(other.parameters()), list(averages[1].parameters()))
        for (flow, adam), average in zip(
            zip((one, other), adams, strict=True), averages, strict=True
        ):
            if flow is other and flat is not None:
                flat.step(torch.cat([p.grad.flatten() for p in flow.parameters()]))
                flat.average(0.9)
                continue
            adam.step()
            with torch.no_grad():
                for kept, weight in zip(average.parameters(), flow.parameters(), strict=True):
                    kept.lerp_(weight, 0.1)
    assert flat is not None
    pairs = [(one, other), tuple(averages)]
    for a, b in [
        pair for flows in pairs for pair in zip(*(f.parameters() for f in flows), strict=True)
    ]:
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    for a, b in zip(*(adam.state_dict()["state"].values() for adam in adams), strict=True):
        torch.testing.assert_close(a, b)
    assert len({p.untyped_storage().data_ptr() for p in other.parameters()}) == 1
    flat.release()
    assert len({p.untyped_storage().data_ptr() for p in other.parameters()}) == len(
        list(other.parameters())
    )


def test_parameters_that_cannot_lie_side_by_side_are_refused():
    weight = nn.Parameter(torch.randn(3, 2).T)
    with pytest.raises(RuntimeError, match="not contiguous"):
        FlatAdam(torch.optim.Adam([weight]), [weight], [])


def learner_of(flow, objective=None, **settings):
    config = cnf.TrainConfig(device="cpu", progress=False, **settings)
    fabric = launch_fabric(config, torch.float64)
    return learner_for(flow, objective or cnf.MaximumLikelihood(), config, fabric)


@pytest.mark.parametrize(
    ("model", "settings", "kind"),
    [
        ("realnvp", {"steps": 100}, Learner),
        ("realnvp", {"steps": 100, "compile": True}, CompiledLearner),
        ("realnvp", {"steps": 100_000}, CompiledLearner),
        ("realnvp", {"steps": 100_000, "compile": False}, Learner),
        ("realnvp", {"steps": 100_000, "accumulate": 2}, Learner),
        ("realnvp", {"seconds": 10}, Learner),
        ("cnf", {"steps": 100}, Learner),
        ("cnf", {"steps": 100, "compile": True}, CompiledSolveLearner),
        ("cnf", {"seconds": 200}, CompiledSolveLearner),
        ("cnf", {"seconds": 180}, Learner),
    ],
)
def test_the_budget_decides_what_is_compiled_unless_it_is_told(model, settings, kind, small):
    assert type(learner_of(small(model), **settings)) is kind


def test_a_flow_of_several_odes_needs_a_longer_budget(small):
    one = small("cnf")
    two = cnf.Flow(one.base, cnf.transforms.Compose([one.transform, small("cnf").transform]))
    assert type(learner_of(one, steps=2_500)) is CompiledSolveLearner
    assert type(learner_of(two, steps=4_999)) is Learner
    assert type(learner_of(two, steps=5_000)) is CompiledSolveLearner


def test_pictures_are_compiled_only_if_told():
    flow = cnf.models.build("realnvp", shape=(1, 4, 4), hidden=(4,)).double()
    assert type(learner_of(flow, steps=10**6)) is Learner
    assert type(learner_of(flow, steps=10, compile=True)) is CompiledLearner


def test_products_with_few_columns_are_turned_and_stay_the_same():
    def gradient(rows, inputs):
        return (rows.T @ inputs,)

    inputs = [torch.randn(256, n, dtype=torch.float64) for n in (64, 3)]
    record = _recorded(gradient, inputs)
    assert "aten.t.default(inputs_1)" in record.code
    found, wanted = record(*inputs)[0], gradient(*inputs)[0]
    torch.testing.assert_close(found, wanted)


def test_compilation_that_cannot_be_is_refused_in_words(small):
    with pytest.raises(ValueError, match=r"compile=True compiles .* got accumulate=2; leave"):
        learner_of(small("realnvp"), compile=True, accumulate=2)


def test_a_budget_in_steps_is_judged_by_itself_alone(monkeypatch, small):
    program = program_of(small("nsf"), cnf.MaximumLikelihood())[-1]
    program.size = 1_000
    costs = 2 * (4 + 0.015 * 1_000)
    enough = costs / (6e-6 * 1_000)
    for known in (False, True):
        monkeypatch.setattr(compiled, "_known", lambda _, known=known: _Known(known))
        assert pays(cnf.TrainConfig(steps=int(enough) + 1), program)
        assert not pays(cnf.TrainConfig(steps=int(enough) - 1), program)
        assert pays(cnf.TrainConfig(seconds=60), program) == known
        assert pays(cnf.TrainConfig(seconds=costs / 0.375 + 1), program)
    monkeypatch.setattr(compiled, "_known", lambda _: _Known(False))
    assert not pays(cnf.TrainConfig(seconds=costs / 0.375 - 1), program)


class _Known:
    def __init__(self, exists):
        self.exists = lambda: exists


@pytest.fixture
def trained(config):
    """(flow, objective) → the history of a run of 20 steps."""

    def fit(flow, objective, callbacks=(), **settings):
        settings = config(steps=20, validations=0, ema=0.5, **settings)
        return cnf.fit(flow, objective, batch(64).x, settings, callbacks=callbacks)

    return fit


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs stay records, which are replayed operation by operation: the same numbers."""
    monkeypatch.setattr(Program, "compile", lambda self: None)


@pytest.mark.parametrize(
    ("model", "objective"), [("cnf", cnf.FlowMatching()), ("nsf", cnf.MaximumLikelihood())]
)
def test_a_run_of_programs_ends_at_the_weights_of_one_without(
    model, objective, uncompiled, small, trained
):
    one, other = small(model), small(model)
    trained(one, objective, compile=False)
    history = trained(other, objective, compile=True)
    assert history.compiled and history.compiling > 0
    assert len({p.untyped_storage().data_ptr() for p in other.parameters()}) > 1  # as it came
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_run_of_programs_resumes_bit_for_bit(uncompiled, tmp_path, small, trained):
    whole, parts = small("realnvp"), small("realnvp")
    trained(whole, cnf.MaximumLikelihood(), compile=True)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 7:
            raise Stop

    settings = {"compile": True, "folder": tmp_path / "run"}
    with pytest.raises(Stop):
        trained(parts, cnf.MaximumLikelihood(), callbacks=[stop], **settings)
    for _ in range(2):  # the second time it has ended
        assert trained(parts, cnf.MaximumLikelihood(), resume=True, **settings).compiled
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_too_short_to_be_compiled_says_that_it_was_not(
    uncompiled, monkeypatch, small, trained
):
    monkeypatch.setattr("cnf.training.learners.LEAST_STEPS", 1)
    history = trained(small("realnvp"), cnf.MaximumLikelihood(), compile="auto")
    assert not history.compiled and history.compiling > 0  # of the attempt


class Reads(Objective):
    """An objective that reads its loss, which no record can hold."""

    capturable = True

    def __call__(self, module, batch, generator=None):
        value = -module.log_prob(batch.x).mean()
        return Loss(value, {"read": torch.tensor(value.item())})


def test_an_objective_that_reads_a_number_is_trained_without_a_program(
    uncompiled, monkeypatch, small, trained
):
    monkeypatch.setattr("cnf.training.learners.LEAST_STEPS", 1)
    one, other = small("realnvp"), small("realnvp")
    with pytest.warns(UserWarning, match="steps are not compiled, as that failed: "):
        trained(one, Reads(), compile="auto")
    trained(other, Reads(), compile=False)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="reads a number on the host"):
        trained(one, Reads(), compile=True)


def test_rows_of_another_shape_take_an_uncompiled_step(uncompiled, small):
    learner = learner_of(small("realnvp"), compile=True)
    rows = [learner.prepare(batch(n), torch.Generator())[0] for n in (16, 12)]
    learner.warm_up(rows[0])
    conditions = learner._program.conditions
    assert conditions.hold(rows[0]) and not conditions.hold(rows[1])
    loss = learner.step(rows[1], 0.0)
    torch.testing.assert_close(
        loss.value.double(), learner._loss(rows[1]).value, rtol=1e-6, atol=0
    )


def test_rows_with_a_gradient_of_their_own_take_an_uncompiled_step(uncompiled, small):
    learner = learner_of(small("nsf", context=1), compile=True)
    rows = learner.prepare(batch(context=1), torch.Generator())[0]
    learner.warm_up(rows)
    rows.context.requires_grad_()
    learner.step(rows, 0.0)
    assert rows.context.grad is not None


def test_a_number_that_changes_ends_the_use_of_a_program(uncompiled):
    flow = flow_of(Scaled())
    learner = learner_of(flow, cnf.FlowMatching(), compile=True)
    rows = learner.prepare(batch(), torch.Generator())[0]
    learner.warm_up(rows)
    for _ in range(9):
        learner.step(rows, 0.0)
    flow.field.shift = 1.0
    with pytest.warns(
        UserWarning, match="a number that it computes with has probably changed since"
    ):
        loss = learner.step(rows, 0.0)
    assert not learner.compiled
    torch.testing.assert_close(loss.value.double(), learner._loss(rows).value, rtol=1e-6, atol=0)


def test_comparing_a_program_leaves_running_statistics_as_they_were():
    field = Linear()
    field.dropout = nn.BatchNorm1d(2)
    _, _, rows, program = program_of(flow_of(field), cnf.FlowMatching())
    before = field.dropout.running_mean.clone()
    plain = program.conditions._plain_loss(rows)
    assert torch.equal(field.dropout.running_mean, before)
    torch.testing.assert_close(plain, program(rows)[0].value)
    assert not torch.equal(field.dropout.running_mean, before)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    program = program_of(flow_of(Linear()), cnf.FlowMatching())[-1]
    (tmp_path / "file").touch()
    monkeypatch.setattr(compiled, "_known", lambda _: tmp_path / "file" / "program")
    compiled._remember(program)


class Differentiates(Linear):
    """The gradient of an energy, by autograd."""

    def forward(self, t, x, context=None):
        x = x if x.requires_grad else x.detach().requires_grad_()
        energy = self.linear(x).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_program_is_compared_where_the_loss_itself_differentiates():
    _, _, rows, program = program_of(flow_of(Differentiates()), cnf.FlowMatching())
    torch.testing.assert_close(program.conditions._plain_loss(rows), program(rows)[0].value)


def test_a_bad_step_of_a_program_is_left_out(uncompiled, small):
    learner = learner_of(small("realnvp"), compile=True)
    rows = learner.prepare(batch(), torch.Generator())[0]
    learner.warm_up(rows)
    before = [parameter.clone() for parameter in learner.parameters]
    learner.step(rows.map(lambda value: value * torch.nan), 0.1)
    assert learner.skipped == 1
    for a, b in zip(learner.parameters, before, strict=True):
        assert torch.equal(a, b)


def test_dropout_draws_anew_in_each_call(uncompiled):
    flow = flow_of(Linear(dropout=0.5))
    _, _, rows, program = program_of(flow, cnf.FlowMatching())
    torch.manual_seed(0)
    first, again = program(rows)[0].value, program(rows)[0].value
    torch.manual_seed(0)
    assert first != again and program(rows)[0].value == first


SOLVES = {
    "exact": {},
    "hutchinson": {"divergence": "hutchinson"},
    "penalties": {"penalties": {"kinetic": 0.1, "jacobian": 0.1}},
}


@pytest.mark.parametrize("case", SOLVES)
def test_a_compiled_solver_step_is_the_step(case, monkeypatch, small):
    """With the compiler out of the way: what is compiled is what computes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    solver = cnf.Solver("rk4", steps=3)
    objective = cnf.MaximumLikelihood(solver=solver, **SOLVES[case])
    flow = small("cnf")
    rows = objective.prepare(flow, batch(), torch.Generator().manual_seed(0))
    with ode.record() as plain:
        wanted = objective(flow, rows).value
    gradient = torch.autograd.grad(wanted, list(flow.parameters()), allow_unused=True)
    with ode.record() as stats, compiled_solves():
        found = objective(flow, rows).value
    torch.testing.assert_close(found, wanted)
    assert (stats.forward, stats.solves) == (plain.forward, plain.solves) == (12, 1)
    other = torch.autograd.grad(found, list(flow.parameters()), allow_unused=True)
    for a, b in zip(other, gradient, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_solver_steps_keep_to_the_memory_of_the_solver(monkeypatch, small):
    taken = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda *a: taken.append(1) or function(*a)
    )
    solver = cnf.Solver("rk4", steps=3, memory=1e-9, compile=True)
    flow = small("cnf").with_solver(solver)
    with ode.record() as stats:
        flow.log_prob(batch().x).sum().backward()
    assert stats.backward == 12  # by checkpoints, which evaluate again
    assert len(taken) == 24 + 2  # each an evaluation, none a step; two measured the memory


def test_a_compiled_solve_that_becomes_infinite_says_why(monkeypatch, small):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flow = small("cnf").with_solver(cnf.Solver("rk4", steps=3, compile=True))
    with torch.no_grad():
        next(flow.field.parameters()).fill_(torch.inf)
    with pytest.raises(cnf.SolverError, match="the field returned NaN or infinity"):
        flow.log_prob(batch().x)


@pytest.mark.parametrize(
    ("dtype", "settings", "why"),
    [
        (torch.float64, {"max_nfe": 11}, "11 evaluations"),
        (torch.bfloat16, {}, "of dtype torch.bfloat16 is too coarse"),
    ],
)
def test_a_compiled_solve_is_refused_as_a_plain_one(dtype, settings, why, monkeypatch, small):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    solver = cnf.Solver("rk4", steps=3, compile=True, **settings)
    flow = small("cnf").with_solver(solver).to(dtype)
    with pytest.raises(cnf.SolverError, match=why):
        flow.log_prob(batch().x.to(dtype))


def test_a_run_compiles_its_solves_and_ends_at_the_same_weights(monkeypatch, small, trained):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    objective = cnf.MaximumLikelihood(solver=cnf.Solver("rk4", steps=3))
    one, other = small("cnf"), small("cnf")
    assert not trained(one, objective, compile=False).compiled
    assert trained(other, objective, compile=True).compiled
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_solves_that_cannot_be_compiled_are_trained_as_they_are(monkeypatch, small, trained):
    def refuse(function, **_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr("cnf.training.learners.LEAST_SOLVES", 1)
    objective = cnf.MaximumLikelihood(solver=cnf.Solver("rk4", steps=3))
    one, other = small("cnf"), small("cnf")
    with pytest.warns(UserWarning, match="steps are not compiled, as that failed: no compiler; "):
        assert not trained(one, objective, compile="auto").compiled
    trained(other, objective, compile=False)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="no compiler"):
        trained(one, objective, compile=True)
