"""bf16-mixed: bfloat16 in fields and networks only."""

import math
import warnings

import pytest
import torch

import cnf
from cnf import FlowMatching, MaximumLikelihood
from cnf.objectives import Objective
from cnf.precision import tf32
from cnf.training.learner import _accelerator
from cnf.training.loop import _rounding

MODELS = ["cnf", "otflow", "realnvp", "nsf", "nsf-ar", "maf", "glow"]


def trained(flow, objective, data, config, **settings):
    return cnf.fit(flow, objective, data, config(steps=5, clip=1.0, **settings))


@pytest.mark.parametrize("name", MODELS)
def test_likelihood_in_bf16_mixed_is_close_to_float32(name, small, config, points):
    losses = []
    for precision in ("bf16-mixed", None):
        flow = small(name)
        history = trained(flow, MaximumLikelihood(), points, config, precision=precision, ema=None)
        losses.append(torch.tensor([record["loss"] for record in history.records]))
        assert all(p.dtype == torch.float32 for p in flow.parameters())
        assert flow.log_prob(points).dtype == torch.float32
    assert losses[0].isfinite().all() and not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0, atol=0.05)  # of about 4 nats


def test_bf16_mixed_does_not_round_the_data(small, config):
    x = 1000 + torch.linspace(0, 1, 4096)
    x = torch.stack([x, x.view(64, 64).T.flatten()], 1)
    met = []

    class PrecisionRecorder(Objective):
        def prepare(self, module, batch, generator=None):
            return batch

        def __call__(self, module, batch, generator=None):
            assert torch.is_autocast_enabled("cpu")
            met.append(batch.x[:, 0])
            return MaximumLikelihood()(module, batch, generator)

    settings = {"precision": "bf16-mixed", "batch_size": 3000, "validations": 0}
    cnf.fit(small("realnvp"), PrecisionRecorder(), x, config(steps=1, **settings))
    (rows,) = met
    assert rows.dtype == torch.float32 and len(rows.unique()) == 3000


def test_validation_is_in_full_precision(small, config, points):
    flow = small()
    history = trained(flow, FlowMatching(), points, config, precision="bf16-mixed", validations=1)
    held_out = cnf.training.stream.as_stream(points, config(steps=5)).validation
    expected = -flow.eval().log_prob(held_out.x).double().mean().item()
    assert math.isclose(history.records[-1]["val_nll"], expected, rel_tol=1e-6)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-true", "transformer-engine"])
def test_precisions_too_narrow_for_log_determinants_are_refused(precision):
    with pytest.raises(ValueError, match=f"'{precision}'.*take 'bf16-mixed'"):
        cnf.TrainConfig(precision=precision)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("64-true", torch.float32), ("32-true", torch.float64), ("bf16-mixed", torch.float64)],
)
def test_precision_other_than_the_modules_dtype_is_refused(
    precision, dtype, small, config, points
):
    with pytest.raises(ValueError, match=f"precision='{precision}'.*got {dtype}"):
        trained(small().to(dtype), FlowMatching(), points, config, precision=precision)


def test_module_in_bfloat16_is_refused(small, config, points):
    with pytest.raises(ValueError, match=r"got torch.bfloat16; call module.float\(\)"):
        trained(small().bfloat16(), FlowMatching(), points, config)


CURVES = {
    "flow matching": (FlowMatching(), 200, 0.03),
    "likelihood": (MaximumLikelihood(solver=cnf.Solver("rk4", steps=4)), 50, 0.01),
}


@pytest.mark.parametrize("case", CURVES)
def test_the_loss_in_bf16_mixed_falls_as_in_float32(case, small, config):
    objective, steps, near = CURVES[case]
    curves = []
    for precision in ("bf16-mixed", None):
        settings = config(steps=steps, batch_size=256, precision=precision, validations=0)
        history = cnf.fit(small(), objective, cnf.data.toy("moons"), settings)
        losses = history.column("loss")
        tenth = len(losses) // 10
        curves.append(torch.tensor(losses[: 10 * tenth]).reshape(10, -1).mean(1))
    assert curves[1][-1] < 0.97 * curves[1][0]
    torch.testing.assert_close(*curves, rtol=near, atol=0)


def products():
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32


@pytest.mark.parametrize(
    ("allowed", "inside"), [(True, ("high", True)), (False, ("highest", False))]
)
@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_set_inside_of_a_context_alone(allowed, inside, before):
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        _expect_inside_alone(allowed, inside)
    finally:
        torch.set_float32_matmul_precision(usual)


def _expect_inside_alone(allowed, inside):
    before = products()
    with pytest.raises(KeyError), tf32(allowed):
        assert products() == inside
        raise KeyError
    assert products() == before


@pytest.mark.parametrize(
    ("precision", "inside"), [("tf32", True), ("32-true", False), (None, None)]
)
def test_steps_on_a_gpu_are_in_the_precision_asked_for(precision, inside):
    config = cnf.TrainConfig(precision=precision)
    before = products()[1]
    with _rounding(config, "cuda")():
        assert products()[1] == (before if inside is None else inside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TF32, which a CPU has not
        elsewhere = _rounding(config, "cpu")
    with elsewhere():
        assert products()[1] == before


def test_float64_on_a_mac_is_refused_in_words_or_left_to_the_cpu(monkeypatch):
    with pytest.raises(
        ValueError, match="device='mps' has no float64, got a module in float64; call"
    ):
        _accelerator("mps", torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _accelerator("auto", torch.float64) == "cpu"
    assert _accelerator("auto", torch.float32) == "auto"
    assert _accelerator("mps", torch.float32) == "mps"


@pytest.mark.parametrize("strategy", ["fsdp_cpu_offload", "deepspeed_stage_2", "fsdp2"])
def test_other_sharding_strategies_are_refused_in_words(strategy):
    with pytest.raises(ValueError, match=f"'ddp', or 'fsdp' to .* got '{strategy}'; against"):
        cnf.TrainConfig(strategy=strategy)


def test_tf32_on_a_cpu_says_that_it_has_no_effect(small, config, points):
    with pytest.warns(UserWarning, match="'tf32' is that of products on a CUDA device, got 'cpu'"):
        cnf.fit(small(), cnf.FlowMatching(), points, config(precision="tf32"))
