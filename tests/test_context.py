"""Contexts are standardized like data, once, by every method of a flow."""

import copy
import warnings

import pytest
import torch

import cnf
from cnf.fields import MLPField
from cnf.models import MODELS
from cnf.sampling import sde
from cnf.training import load, save
from cnf.training.preprocessing import fit_preprocessing
from cnf.transforms import Compose, Continuous, Softplus, Standardize, StandardizeContext

F64 = torch.float64
FAST = {"steps": 2, "progress": False, "validations": 0}


def test_columns_are_standardized_except_labels_and_missing_values(generator):
    n = 50
    varied = 5e4 + 1e4 * torch.randn(n, 1, generator=generator, dtype=F64)
    label = (torch.arange(n) % 2).double()[:, None]
    year, missing = torch.full((n, 1), 2024.0).double(), varied.clone()
    missing[::2] = torch.nan
    standardize = StandardizeContext(4)
    standardize.fit(torch.cat([varied, label, year, missing], 1))
    inner = standardize(torch.cat([varied, label, year, missing], 1))
    torch.testing.assert_close(inner[:, :1], (varied - varied.mean()) / varied.std())
    assert torch.equal(inner[:, 1:2], label)
    assert (inner[:, 2] == 0).all()  # 2024 itself would drown all else
    known = missing[1::2]
    torch.testing.assert_close(inner[1::2, 3:], (known - known.mean()) / known.std())
    assert inner[::2, 3].isnan().all()
    standardize.fit(7 + varied[:, [0, 0, 0, 0]].square())  # the first fit is the last
    assert torch.equal(standardize(varied.expand(n, 4)[:, :1].expand(n, 4))[:, 0], inner[:, 0])


def test_contexts_in_seconds_since_1970_are_resolved_by_a_float32_flow():
    seconds = 1.7e9 + 60 * torch.arange(100, dtype=F64)[:, None]
    flow = cnf.models.build("realnvp", dim=1, context=1, layers=2, hidden=(8,))
    cnf.fit(flow, cnf.MaximumLikelihood(), torch.randn(100, 1), cnf.TrainConfig(**FAST),
            context=seconds)  # fmt: skip
    inner = flow.float().inner_context("test", seconds, None)
    expected = (seconds - seconds.mean()) / seconds.std()
    assert inner.dtype == torch.float32  # one second of 1.7e9 is nothing in float32
    torch.testing.assert_close(inner, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cnf", "nsf"])
def test_every_call_standardizes_the_context_once(name, small_flow, generator):
    flow = small_flow(name, context=3, gain=0.4)
    bare = copy.deepcopy(flow)
    bare.context_preprocess = None
    x, z = (torch.randn(5, 2, generator=generator, dtype=F64) for _ in range(2))
    context = 3 + 2 * torch.randn(5, 3, generator=generator, dtype=F64)
    inner = flow.context_preprocess(context)
    assert (inner - context).abs().min() > 1e-3

    def drawn():
        return torch.Generator().manual_seed(0)

    calls = [
        lambda f, c: f.log_prob(x, c),
        lambda f, c: f.encode(x, c),
        lambda f, c: f.decode(z, c),
        lambda f, c: f.sample((), c, generator=drawn()),
        lambda f, c: f.rsample((2,), c, generator=drawn()),
        lambda f, c: f.sample_and_log_prob((), c, generator=drawn())[1],
        lambda f, c: f.distribution(c).log_prob(x),
    ]
    if name == "cnf":
        calls += [
            lambda f, c: f.trajectory(z, (0.0, 0.5, 1.0), c),
            lambda f, c: f.log_prob_and_integral(x, c)[0],
            lambda f, c: sde(f, (), c, steps=3, generator=drawn()),
            lambda f, c: cnf.FlowMatching()(f, cnf.Batch(x, c), drawn()).value,
            lambda f, c: cnf.MaximumLikelihood()(f, cnf.Batch(x, c)).value,
            lambda f, c: torch.tensor(cnf.metrics.straightness(f, 5, drawn(), c).value),
        ]
    for call in calls:
        torch.testing.assert_close(call(flow, context), call(bare, inner), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["nsf", "cnf"])
def test_training_does_not_depend_on_the_units_of_the_context(name, generator):
    u = 6 * torch.rand(600, 1, generator=generator, dtype=F64) - 3
    y = torch.sin(2 * u) + 0.1 * torch.randn(600, 1, generator=generator, dtype=F64)
    scores = []
    for context in (u, 1e4 * u + 5e4):
        torch.manual_seed(0)
        flow = cnf.models.build(name, dim=1, context=1, hidden=(16, 16))
        objective = cnf.FlowMatching() if name == "cnf" else cnf.MaximumLikelihood()
        settings = cnf.TrainConfig(steps=10, progress=False, validations=0)
        cnf.fit(flow, objective, y, settings, context=context)
        with torch.no_grad():
            scores.append(flow.log_prob(y, context).mean().item())
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_pairs_do_not_depend_on_the_units_of_the_context(small_flow, generator):
    """Two columns: one distance over both would otherwise follow the larger unit."""
    x, context = (torch.randn(40, 2, generator=generator, dtype=F64) for _ in range(2))
    objective, paired = cnf.FlowMatching(coupling="conditional-ot"), []
    flow = small_flow("cnf", context=2)
    for unit in (1.0, 1e4):
        given = context * torch.tensor([unit, 1.0], dtype=F64)
        flow.context_preprocess = StandardizeContext(2)
        flow.context_preprocess.fit(given)
        batch = objective.prepare(flow, cnf.Batch(x, given), torch.Generator().manual_seed(4))
        paired.append(batch.x1)
    torch.testing.assert_close(*paired, rtol=0, atol=0)
    assert not torch.equal(paired[0], flow.inside(x)[0])


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_every_model_standardizes_its_context_by_default(name):
    assert isinstance(
        cnf.models.build(name, dim=2, context=3).context_preprocess, StandardizeContext
    )
    assert cnf.models.build(name, dim=2).context_preprocess is None
    flow_without = cnf.models.build(name, dim=2, context=3, context_preprocess=None)
    assert flow_without.context_preprocess is None


def test_flow_saved_before_contexts_were_standardized_loads_unchanged(tmp_path):
    flow = cnf.models.build("nsf", dim=2, context=3, context_preprocess=None, hidden=(8,))
    del flow.spec["options"]["context_preprocess"]
    read = load(save(flow, tmp_path / "old.safetensors"))
    x, context = torch.randn(4, 2), 100 * torch.randn(4, 3)
    assert read.context_preprocess is None
    assert torch.equal(read.log_prob(x, context), flow.log_prob(x, context))


def test_log_prob_far_outside_of_what_was_fitted_warns_once():
    flow = cnf.models.build("realnvp", dim=2, context=1, layers=2, hidden=(8,))
    flow.preprocess.fit(torch.randn(100, 2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(100 * torch.randn(50, 2), torch.zeros(1))  # an outlier is no mistake
    flow.log_prob(torch.full((3, 2), 5e4), torch.zeros(1))  # training does not look
    with torch.no_grad(), pytest.warns(UserWarning, match="log_prob: x is up to .* scales"):
        flow.log_prob(torch.full((3, 2), 5e4), torch.zeros(1))
    with torch.no_grad():
        flow.log_prob(torch.full((3, 2), 5e4), torch.zeros(1))  # not again


def test_log_prob_with_a_context_far_outside_warns():
    flow = cnf.models.build("realnvp", dim=2, context=1, layers=2, hidden=(8,))
    flow.preprocess.fit(torch.randn(100, 2))
    flow.context_preprocess.fit(torch.randn(100, 1))
    with torch.no_grad(), pytest.warns(UserWarning, match="log_prob: x is up to .* scales"):
        flow.log_prob(torch.full((3, 2), 5e4), torch.zeros(3, 1))  # of x alone
    with torch.no_grad(), pytest.warns(UserWarning, match="log_prob: context is up to .* scales"):
        flow.log_prob(torch.zeros(3, 2), torch.full((3, 1), 5e4))


@pytest.mark.parametrize("inner", [1, 2])
def test_far_data_warn_with_composed_preprocessing(inner):
    parts = [Standardize((2,)), Softplus()][:inner]
    flow = cnf.models.build("realnvp", dim=2, layers=2, hidden=(8,))
    flow.preprocess = Compose([Compose(parts)])
    with torch.no_grad():
        flow.log_prob(torch.full((3, 2), 5e4))  # nothing was fitted yet
    flow.preprocess.fit(0.5 + torch.rand(100, 2))
    with torch.no_grad(), pytest.warns(UserWarning, match="log_prob: x is up to .* scales"):
        flow.log_prob(torch.full((3, 2), 5e4))


def test_gpu_data_are_checked_in_calls_1_2_4_8_only(monkeypatch):
    near, far = torch.zeros(3, 2), torch.full((3, 2), 5e4)
    flow = cnf.models.build("realnvp", dim=2, layers=2, hidden=(8,))
    flow.preprocess.fit(torch.randn(100, 2))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    with torch.no_grad():
        for x in (near, near, far, near, far, far, far):  # calls 3, 5, 6, 7
            flow.log_prob(x)
        with pytest.warns(UserWarning, match="log_prob: x is up to .* scales"):
            flow.log_prob(far)
    first = cnf.models.build("realnvp", dim=2, layers=2, hidden=(8,))
    first.preprocess.fit(torch.randn(100, 2))
    with torch.no_grad(), pytest.warns(UserWarning, match="log_prob: x is up to .* scales"):
        first.log_prob(far)


def test_far_data_are_not_checked_on_the_meta_device():
    flow = cnf.models.build("realnvp", dim=2, layers=2, hidden=(8,))
    flow.preprocess.fit(torch.randn(100, 2))
    with torch.no_grad():
        assert flow.to("meta").log_prob(torch.empty(3, 2, device="meta")).shape == (3,)


def test_context_of_lower_precision_than_fitted_warns():
    seconds = 1.7e9 + 60 * torch.arange(100, dtype=F64)[:, None]
    flow = cnf.models.build("realnvp", dim=2, context=1, layers=2, hidden=(8,))
    flow.context_preprocess.fit(seconds)
    x = torch.randn(100, 2)
    assert flow.log_prob(x, seconds).isfinite().all()
    with pytest.warns(UserWarning, match=r"float32 merges values of context in columns \[0\]"):
        flow.log_prob(x, seconds.float())
    with pytest.warns(UserWarning, match=r"float32 merges values of context in columns \[0\]"):
        flow.sample((), seconds.float())
    flow.context_preprocess = None
    with pytest.warns(UserWarning, match=r"float32 merges values of context in columns \[0\]"):
        flow.log_prob(x, seconds)
    assert flow.log_prob(x, seconds - 1.7e9).isfinite().all()  # what float32 holds as well


def test_contexts_that_float32_does_not_resolve_are_refused_in_training_by_name():
    context = torch.stack([torch.randn(100).double(), 1.7e9 + torch.arange(100.0).double()], 1)
    flow = cnf.models.build("realnvp", dim=2, context=2, context_preprocess=None, hidden=(8,))
    with pytest.raises(ValueError, match=r"float32 merges .* of column 1 of context; build"):
        cnf.fit(flow, cnf.MaximumLikelihood(), torch.randn(100, 2), cnf.TrainConfig(**FAST),
                context=context)  # fmt: skip


def test_device_without_float64_refuses_unresolved_contexts_when_fitted(monkeypatch):
    """Not only once a checkpoint is loaded."""
    noise = torch.randn(100, 1, dtype=F64)
    near, far = StandardizeContext(2), StandardizeContext(2)
    near.fit(torch.cat([noise, noise], 1))
    far.fit(torch.cat([noise, 1.7e9 + noise], 1))
    assert near.columns.dtype == far.columns.dtype == F64
    again = StandardizeContext(2)
    again.load_state_dict(far.state_dict())
    assert far.columns.unresolved == again.columns.unresolved == (1,)
    assert again.columns.dtype == F64
    monkeypatch.setattr("cnf.transforms.preprocessing.widest", lambda device: torch.float32)
    assert near.to("cpu").columns.loc.dtype == torch.float32
    with pytest.raises(ValueError, match=r"columns \[1\] need float64, which cpu does"):
        far.to("cpu")


def test_fit_on_data_or_contexts_in_other_units_than_the_first_warns():
    flow = cnf.models.build("realnvp", dim=2, context=1, layers=2, hidden=(8,))
    x, context, settings = torch.randn(100, 2), torch.randn(100, 1), cnf.TrainConfig(**FAST)
    cnf.fit(flow, cnf.MaximumLikelihood(), x, settings, context=context)
    with pytest.warns(UserWarning, match="fit: columns 0 of context are up to"):
        cnf.fit(flow, cnf.MaximumLikelihood(), x + 1, settings, context=1e3 * context)


def test_warning_for_fit_of_a_hand_built_flow_shows_the_code_to_standardize():
    x, settings = 1e4 * torch.randn(100, 2), cnf.TrainConfig(**FAST)

    def build(**parts):
        return cnf.Flow(None, Continuous(MLPField(2, (8,))), event_shape=(2,), **parts)

    with pytest.warns(UserWarning, match=r"preprocess=cnf.transforms.Standardize\(\(2,\)\)"):
        cnf.fit(build(), cnf.FlowMatching(), x, settings)
    cnf.fit(build(), cnf.FlowMatching(), x / 1e4, settings)
    cnf.fit(build(preprocess=Standardize((2,))), cnf.FlowMatching(), x, settings)


@pytest.mark.parametrize("times", [20, 45])
@pytest.mark.parametrize("kind", ["wide", "narrow", "off"])
def test_data_of_a_hand_built_flow_within_30_times_unit_scale_do_not_warn(kind, times, generator):
    rows = torch.randn(1_000, 2, generator=generator)
    x = {"wide": times * rows, "narrow": rows / times, "off": times + rows}[kind]
    flow = cnf.Flow(None, Continuous(MLPField(2, (8,))), event_shape=(2,))
    if times < 30:
        fit_preprocessing(flow, cnf.Batch(x))  # warnings are errors here
        return
    with pytest.warns(UserWarning, match="fit: columns 0, 1 of x are far from unit scale"):
        fit_preprocessing(flow, cnf.Batch(x))
    fit_preprocessing(flow, cnf.Batch(x))  # not again


def test_context_preprocess_of_another_size_is_refused():
    transform = Continuous(MLPField(2, (8,), 3))
    with pytest.raises(ValueError, match="context_preprocess of size 3.* got 2"):
        cnf.Flow(None, transform, context_preprocess=StandardizeContext(2), event_shape=(2,))
