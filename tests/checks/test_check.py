"""Every way to be wrong is planted in a copy, and the check of that name must find it."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

import cnf
from cnf.checks.check import CHECKS, CheckReport, Finding, check
from cnf.dynamics.divergence import Divergence, Hutchinson, Rates
from cnf.dynamics.solver import Solver
from cnf.fields import MLPField, VectorField
from cnf.fields.trace import trace_of_jacobian
from cnf.flow import Flow
from cnf.models import MODELS
from cnf.registry import options_of
from cnf.transforms import Affine, Compose, Continuous, Coupling, Standardize

# torch itself calls its deprecated torch.jit.script in the first forward-mode derivative
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded():
    """Initial weights are drawn from torch's own generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def perturbed(module, spread=0.2, seed=0):
    """`module` with weights far from where they start: an identity hides most faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return module


def data(n=256, dim=2, seed=0):
    """Correlated, off center, of another scale in each direction."""
    z = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return z * (0.5 + torch.arange(dim)) + 3.0 + 0.3 * z.roll(1, -1)


def continuous(field, solver=None, divergence="exact", preprocess=None):
    transform = Continuous(perturbed(field), solver or Solver(), divergence)
    return Flow(None, transform, preprocess, event_shape=field.event_shape)


def couplings(*kinds, context=0):
    parts = [
        kind(2, [layer % 2], hidden=(16, 16), context_dim=context)
        for layer, kind in enumerate(kinds)
    ]
    return Flow(None, perturbed(Compose(parts)), event_shape=(2,))


def small_field(kind=MLPField, context_dim=0):
    return kind(2, (16, 16), context_dim=context_dim)


def expect_failure(flow, name, *words, x=None, **options):
    """`check` fails under `name`, with these words; the report."""
    report = check(flow, x, **options)
    assert not report and not report.ok
    assert report[name].passed is False, str(report)
    for word in words:
        assert word in report[name].message, str(report)
    return report


def failed(report):
    return {finding.name for finding in report.failures}


# --- healthy flows pass ---


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_every_model_passes_with_random_weights(name, context, dim):
    options = {"dim": dim, "context": context, "hidden": (16, 16)}
    options = {k: v for k, v in options.items() if k in options_of(MODELS[name])}
    try:
        flow = cnf.models.build(name, **options)
    except ValueError:
        assert dim == 1  # a coupling has nothing to condition on in one dimension
        return
    report = check(perturbed(flow, 0.1))
    assert report.ok, str(report)
    assert report["mass"].passed is (True if dim < 3 else None)
    assert any("context" in note for note in report.notes) == bool(context)


@pytest.mark.parametrize("name, dim", [("nsf", 2), ("nsf-ar", 2), ("nsf-ar", 1)])
def test_density_of_angles_integrates_to_one_over_a_period(name, dim):
    angles = {"period": 2 * math.pi, "preprocess": None, "between": None}
    flow = perturbed(cnf.models.build(name, dim=dim, hidden=(16,), **angles), 0.05)
    found = check(flow)["mass"]
    assert found.passed and found.measured < 1e-3


@pytest.mark.parametrize("name", ["cnf", "realnvp"])
def test_fitted_preprocessing_and_data_pass(name):
    flow = perturbed(cnf.models.build(name, dim=2, hidden=(16, 16)))
    flow.preprocess.fit(data())
    assert (flow.preprocess.scale - 1).abs().min() > 0.1
    report = check(flow, data())
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["cnf", "realnvp"])
def test_a_context_for_each_point_passes_in_float64(name):
    flow = perturbed(cnf.models.build(name, dim=2, context=3, hidden=(16, 16)), 0.1).double()
    flow.preprocess.fit(data().double())
    x = data(100).double().reshape(2, 50, 2)
    context = torch.randn(2, 50, 3, dtype=torch.float64)
    report = check(flow, x, context=context)
    assert report.ok, str(report)
    assert not any("context" in note for note in report.notes)


def test_a_flow_at_initialization_passes_although_zeros_hide_gradients():
    flow = cnf.models.build("realnvp", dim=2, hidden=(16, 16))
    assert check(flow)["gradients"].passed


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_either_gradient_and_a_fine_fixed_step_pass(method, gradient):
    steps = 20 if method == "rk4" else None
    report = check(continuous(small_field(), Solver(method, steps=steps, gradient=gradient)))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "base",
    [
        cnf.distributions.Uniform(torch.zeros(2), torch.ones(2)),
        cnf.distributions.GaussianMixture(
            torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), torch.full((2, 2), 0.1)
        ),
        cnf.data.toy("pinwheel"),
    ],
    ids=["uniform", "sharp mixture", "toy"],
)
def test_other_bases_pass(base):
    flow = Flow(base, perturbed(Coupling(2), 0.1), event_shape=(2,))
    report = check(flow)
    assert report.ok, str(report)


def test_a_parameterless_flow_has_no_gradients_to_check():
    flow = Flow(None, Standardize((2,)), event_shape=(2,))
    report = check(flow)
    assert report.ok and report["gradients"].passed is None
    assert "nothing is trained" in report["gradients"].message


@pytest.mark.slow
def test_a_trained_sharp_density_passes():
    torch.manual_seed(0)
    toy = cnf.data.toy("pinwheel")
    flow = cnf.models.build("cnf", dim=2, hidden=(64, 64))
    settings = cnf.TrainConfig(steps=2000, batch_size=512, seed=0, validations=0, progress=False)
    cnf.fit(flow, cnf.FlowMatching(), toy, settings)
    report = check(flow, toy.sample(1000, torch.Generator().manual_seed(1)))
    assert report.ok, str(report)


def test_a_jacobian_singular_in_float64_is_judged_by_its_parts():
    flow = perturbed(cnf.models.build("realnvp", dim=2), 0.2)
    report = check(flow)
    assert report["log-determinant"].passed, str(report)
    assert report["mass"].passed is None and "too sharp" in report["mass"].message


# --- planted faults are found, by name ---


class FlippedTrace(MLPField):
    def with_divergence(self, t, x, context=None):
        v, div = super().with_divergence(t, x, context)
        return v, -div


def test_a_flipped_trace_sign_is_found():
    report = expect_failure(
        continuous(small_field(FlippedTrace)), "log-determinant", "FlippedTrace", "wrong sign"
    )
    assert failed(report) == {"mass", "log-determinant"}
    assert "integrates to" in report["mass"].message and "sign" in report["mass"].message
    assert report["round trip"].passed and report["consistency"].passed  # they cannot see it


class ForgetfulCoupling(Coupling):
    def forward(self, z, context=None):
        x, ladj = super().forward(z, context)
        return x, torch.zeros_like(ladj)

    def inverse(self, x, context=None):
        z, ladj = super().inverse(x, context)
        return z, torch.zeros_like(ladj)


def test_a_forgotten_log_determinant_is_found():
    report = expect_failure(
        couplings(Coupling, ForgetfulCoupling, Coupling),
        "log-determinant", "ForgetfulCoupling.inverse (part 2 of 3) is missing",
    )  # fmt: skip
    assert report["mass"].passed is False


class OneWayCoupling(Coupling):
    def forward(self, z, context=None):
        x, ladj = super().forward(z, context)
        return x, -ladj


def test_a_log_determinant_wrong_in_forward_only_is_found():
    report = expect_failure(
        couplings(Coupling, OneWayCoupling), "log-determinant", "OneWayCoupling.forward", "sign"
    )
    assert "disagree" in report["consistency"].message
    assert failed(report) == {"log-determinant", "consistency"}  # log_prob itself is right


class ForgetfulStandardize(Standardize):
    def _ladj(self, value):
        return value.new_zeros(value.shape[:-1])


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
def test_a_forgotten_log_determinant_of_preprocessing_is_found(kind):
    preprocess = ForgetfulStandardize((2,))
    preprocess.fit(data())
    transform = Continuous(small_field()) if kind == "continuous" else Coupling(2)
    flow = Flow(None, perturbed(transform), preprocess, event_shape=(2,))
    report = expect_failure(
        flow, "log-determinant", "ForgetfulStandardize.inverse", "is missing", x=data()
    )
    assert report["mass"].passed is False


class DoublyCounted(Compose):
    def inverse(self, x, context=None):
        z, ladj = super().inverse(x, context)
        return z, 2 * ladj


def test_a_wrong_sum_of_right_log_determinants_is_found():
    flow = Flow(None, perturbed(DoublyCounted([Coupling(2)])), event_shape=(2,))
    expect_failure(flow, "log-determinant", "counted twice")


class WrongAffine(Affine):
    def inverse(self, x, *parameters):
        shift, log_scale = parameters
        return (x + shift) * (-log_scale).exp(), -log_scale


class Silent(Coupling):
    """Its log-determinant is missing."""

    def forward(self, z, context=None):
        return super().forward(z, context)[0], z.new_zeros(z.shape[:-1])

    def inverse(self, x, context=None):
        return super().inverse(x, context)[0], x.new_zeros(x.shape[:-1])


def test_log_determinants_of_zero_are_told_to_show_no_wrong_sign():
    flow = couplings(OneWayCoupling)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
    found = check(flow)["log-determinant"]
    assert found.passed and "a wrong sign would not show" in found.message
    assert "would not show" not in check(couplings(Coupling))["log-determinant"].message
    missing = check(couplings(Silent))["log-determinant"]
    assert not missing.passed and "would not show" not in missing.message


class WrongInverse(Coupling):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, transformer=WrongAffine(), **kwargs)


def test_an_inverse_that_is_not_one_is_found():
    report = expect_failure(couplings(Coupling, WrongInverse), "round trip", "not invert")
    assert "log-determinant" not in failed(report)


class CutInEval(MLPField):
    def with_divergence(self, t, x, context=None):
        if self.training:
            return super().with_divergence(t, x, context)
        detached = {name: p.detach() for name, p in self.named_parameters()}
        return functional_call(_Bound(self), {f"field.{n}": p for n, p in detached.items()},
                               (t, x, context))  # fmt: skip


class _Bound(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, x, context):
        return MLPField.with_divergence(self.field, t, x, context)


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_gradients_cut_in_eval_mode_are_found(gradient):
    flow = continuous(small_field(CutInEval), Solver(gradient=gradient))
    report = expect_failure(flow, "gradients", "zero in eval mode only", "layers.0.linear.weight")
    assert failed(report) == {"gradients"}


class CutContext(MLPField):
    def with_divergence(self, t, x, context=None):
        return super().with_divergence(t, x, None if context is None else context.detach())


def test_a_cut_gradient_of_the_context_is_found():
    report = expect_failure(
        continuous(small_field(CutContext, context_dim=3)), "gradients",
        "depends on the context", "no gradient",
    )  # fmt: skip
    assert failed(report) == {"gradients"}


def cut(raw):
    return Affine().parametrize(raw.detach())


class CutCoupling(Coupling):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, parametrize=cut, **kwargs)


def test_parameters_cut_in_both_modes_are_found():
    report = expect_failure(couplings(Coupling, CutCoupling), "gradients", "transforms.1.net")
    assert failed(report) == {"gradients"}


def without_shift(raw):
    shift, log_scale = Affine().parametrize(raw)
    return shift.detach(), log_scale


class PartlyCut(Coupling):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, parametrize=without_shift, **kwargs)


def test_one_of_two_ways_cut_is_found_by_differences():
    expect_failure(couplings(Coupling, PartlyCut), "gradients", "differences")


class IdleParameter(Coupling):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.ones(3))


def test_a_parameter_of_no_use_is_found_unless_frozen():
    flow = couplings(Coupling, IdleParameter)
    expect_failure(flow, "gradients", "does not use transform.transforms.1.idle")
    flow.transform.transforms[1].idle.requires_grad_(False)
    assert check(flow).ok


class Redrawn(Divergence):
    channels = ()

    def draw(self, x, generator=None):
        return None

    def rates(self, field, t, x, context, probe):
        v, div = trace_of_jacobian(lambda z: field(t, z, context), x)
        return Rates(v, div + torch.randn_like(div))


def test_noise_redrawn_on_every_evaluation_is_found():
    report = expect_failure(
        continuous(small_field(), divergence=Redrawn()), "determinism",
        "divergence at one (t, x)", "drawn anew on every evaluation",
    )  # fmt: skip
    assert report["mass"].passed is None and "determinism failed" in report["mass"].message


class DropoutField(MLPField):
    def forward(self, t, x, context=None):
        return super().forward(t, nn.functional.dropout(x, 0.2, self.training), context)

    def with_divergence(self, t, x, context=None):
        return super().with_divergence(t, nn.functional.dropout(x, 0.2, self.training), context)


def test_dropout_is_found():
    expect_failure(continuous(small_field(DropoutField)), "determinism", "train mode", "velocity")


@pytest.mark.parametrize("divergence", ["hutchinson", Hutchinson(probe=torch.ones(1, 64, 2))])
def test_an_estimator_as_the_default_is_found(divergence):
    flow = continuous(small_field(), divergence=divergence)
    expect_failure(flow, "determinism", "estimate (Hutchinson)", "divergence='exact'")


class Whirl(VectorField):
    """Rotation by half a turn with a pull, of another speed at another radius."""

    def __init__(self):
        super().__init__((2,))
        self.pull = nn.Parameter(torch.tensor(0.5))

    def forward(self, t, x, context=None):
        speed = math.pi / (1 + x.square().sum(-1, keepdim=True))
        return speed * torch.stack([-x[..., 1], x[..., 0]], -1) - self.pull * x

    def with_divergence(self, t, x, context=None):
        return self(t, x), (-2 * self.pull).expand(x.shape[:-1])  # a rotation has none


def test_one_euler_step_is_found():
    flow = continuous(Whirl(), Solver("euler", steps=1))
    report = expect_failure(flow, "solver", "euler, 1 steps", "more steps")
    assert "tight solver" in report["log-determinant"].message  # the maths is right
    fine = flow.with_solver(Solver())
    report = check(fine)
    assert report.ok, str(report)


class NaNInSomeRows(Coupling):
    def inverse(self, x, context=None):
        z, ladj = super().inverse(x, context)
        return z, ladj + 0 * (x[..., 0] + 1.0).log()


def test_nan_in_some_rows_is_found():
    expect_failure(couplings(Coupling, NaNInSomeRows), "finite", "rows")


class NaNField(MLPField):
    def with_divergence(self, t, x, context=None):
        v, div = super().with_divergence(t, x, context)
        return v + 0 * (x[..., :1] + 1.0).sqrt(), div


def test_a_solve_that_fails_is_a_finding_not_a_crash():
    expect_failure(continuous(small_field(NaNField)), "finite", "SolverError", "NaN")


class BatchNormed(MLPField):
    def _centered(self, x):
        return x - x.mean(0)

    def forward(self, t, x, context=None):
        return super().forward(t, self._centered(x), context)

    def with_divergence(self, t, x, context=None):
        return super().with_divergence(t, self._centered(x), context)


class BatchNormedInTraining(BatchNormed):
    def _centered(self, x):
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("kind", [BatchNormed, BatchNormedInTraining])
def test_a_row_that_depends_on_its_neighbors_is_found(kind):
    mode = "eval" if kind is BatchNormed else "train"
    expect_failure(continuous(small_field(kind)), "batch independence", mode, "neighbors")


class SinglePrecision(Coupling):
    def forward(self, z, context=None):
        x, ladj = super().forward(z, context)
        return x.float(), ladj.float()

    def inverse(self, x, context=None):
        z, ladj = super().inverse(x, context)
        return z.float(), ladj.float()


def test_float32_out_of_a_float64_flow_is_found():
    expect_failure(couplings(SinglePrecision), "dtype", "float32", "dtype=x.dtype")


def test_no_divergence_at_all_is_found():
    expect_failure(continuous(small_field(), divergence=None), "finite", "divergence=None")


# --- the report, and what is left behind ---


def test_the_report_is_a_line_for_each_check_with_its_mark():
    report = CheckReport(
        [
            Finding("mass", True, 0.001, 0.01, "log_prob integrates to 1.001"),
            Finding("round trip", False, 0.5, 0.001, "misses"),
            Finding("solver", None, None, None, "no ODE is solved"),
        ],
        ("a note",),
    )
    marks = [line.strip()[0] for line in str(report).splitlines()]
    assert marks == ["✓", "✗", "–", "a"]
    assert not report and not report.ok and failed(report) == {"round trip"}
    assert CheckReport(report.findings[::2])


def test_every_check_is_reported_once_in_order():
    report = check(couplings(Coupling, Coupling).eval())  # of one that trains, a note follows
    assert [finding.name for finding in report.findings] == list(CHECKS)
    assert len(str(report).splitlines()) == len(CHECKS)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_changed(training):
    flow = perturbed(cnf.models.build("cnf", dim=2, hidden=(16,))).train(training)
    flow.log_prob(data(8)).mean().backward()
    before = copy.deepcopy(flow.state_dict())
    gradients = {name: p.grad.clone() for name, p in flow.named_parameters()}
    random, dtype, solver = torch.get_rng_state(), torch.get_default_dtype(), flow.transform.solver
    check(flow, data())
    assert all(module.training is training for module in flow.modules())
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in flow.named_parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in flow.parameters())
    assert torch.equal(torch.get_rng_state(), random) and torch.get_default_dtype() == dtype
    assert flow.transform.solver is solver and torch.is_grad_enabled()


def test_the_same_seed_gives_the_same_report_even_without_gradients():
    flow = couplings(Coupling, Coupling)
    with torch.no_grad():
        first = str(check(flow))
    with torch.inference_mode():
        assert str(check(flow)) == first
    assert str(check(flow)) == first


INVALID = {
    "not a flow": (lambda flow: check(flow.transform), TypeError, "expected a cnf.Flow"),
    "shape": (lambda flow: check(flow, torch.zeros(5, 3)), ValueError, r"shape \(\*, 2\)"),
    "empty": (lambda flow: check(flow, torch.zeros(0, 2)), ValueError, "at least one point"),
    "NaN": (lambda flow: check(flow, torch.full((5, 2), math.nan)), ValueError, "NaN"),
    "n": (lambda flow: check(flow, n=0), ValueError, "n > 0"),
    "context": (lambda flow: check(flow, context=torch.zeros(3)), ValueError, "unconditional"),
}


@pytest.mark.parametrize("case", INVALID)
def test_bad_arguments_are_refused_in_words(case):
    call, error, words = INVALID[case]
    with pytest.raises(error, match=words):
        call(couplings(Coupling))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["cnf", "realnvp"])
def test_a_flow_on_a_gpu_passes_and_leaves_its_random_state(name):
    flow = perturbed(cnf.models.build(name, dim=2, context=2, hidden=(16, 16)), 0.1).cuda()
    state = torch.cuda.get_rng_state()
    report = check(flow)
    assert report.ok, str(report)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_note_tells_the_context_taken_where_none_was_given_and_its_units():
    note = check(couplings(Coupling, context=6), n=8).notes[-1]
    row = torch.randn(6, generator=torch.Generator().manual_seed(0))
    numbers = ", ".join(f"{number:.2g}" for number in row[:5].tolist())
    assert f"[{numbers}, …], in the units of the data's contexts; " in note and "--data" in note
    note = check(cnf.models.build("realnvp", dim=2, context=1), n=8).notes[-1]
    assert "], in scales from the mean, as context_preprocess gives contexts; " in note


def test_contexts_in_arrays_are_checked_as_those_in_tensors():
    flow, x = couplings(Coupling, context=1), data(16)
    context = torch.linspace(-1, 1, 16)[:, None]
    assert str(check(flow, x, context=context.numpy())) == str(check(flow, x, context=context))


class Pictures(VectorField):
    """A field of pictures; with `share`, each row sees the mean of all."""

    def __init__(self, share=0.0):
        super().__init__((1, 3, 2))
        self.net, self.share = nn.Conv2d(1, 1, 3, padding=1), share

    def forward(self, t, x, context=None):
        return torch.tanh(self.net(x)) + self.share * x.mean(0)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_flows_of_large_pictures_are_checked_by_one_probe(share, monkeypatch):
    monkeypatch.setattr(sys.modules["cnf.checks.check"], "AFFORDABLE", 4)  # directions
    report = check(continuous(Pictures(share), Solver("rk4", steps=12)))
    assert report["log-determinant"].passed is None
    assert "6 directions" in str(report) and "at 2 points" in str(report)
    assert report["gradients"].passed
    assert {f.name for f in report.failures} == ({"batch independence"} if share else set())


def test_estimates_that_were_not_asked_for_are_found_in_flows_of_large_pictures(monkeypatch):
    monkeypatch.setattr(sys.modules["cnf.checks.check"], "AFFORDABLE", 4)
    report = check(continuous(Pictures(), Solver("rk4", steps=2), divergence="hutchinson"))
    assert "without being asked for one" in report["determinism"].message
    assert report["determinism"].passed is False


def test_a_label_is_taken_for_a_context_of_labels():
    flow = cnf.models.realnvp(2, context=4, hidden=(8,))
    labels = torch.eye(3)[torch.arange(60) % 3]
    flow.context_preprocess.fit(torch.cat([labels, 5 + torch.randn(60, 1)], 1))
    note = next(note for note in cnf.check(flow).notes if note.startswith("context"))
    assert "one label of its columns of zeros and ones" in note
    assert sum(f"{number}," in note for number in ("[1, 0, 0", "[0, 1, 0", "[0, 0, 1")) == 1
