"""Properties of every field, with and without a closed-form divergence."""

import copy

import pytest
import torch

from cnf.fields import (
    LAYERS,
    ConvField,
    DivisiveField,
    EndTime,
    HasDivergence,
    MLPField,
    OnSphere,
    Piecewise,
    PotentialField,
    Preconditioned,
    ResidualField,
    UNetField,
    exact_divergence,
)
from cnf.fields.wrappers import Piece

F64 = torch.float64


def mlp(layer, **options):
    def build(context):
        context = 0 if layer == "ignore" else context
        return MLPField(3, (5, 4), context, layer=layer, **options)

    return build


CASES = {
    "mlp input": mlp("input"),
    **{f"mlp {layer}": mlp(layer) for layer in LAYERS},
    "mlp with all": mlp("concatsquash", fourier=2, skip=True, frequencies=0),
    "mlp of angles": mlp("input", fourier=2, period=3.0),
    "sphere": lambda context: OnSphere(MLPField(3, (5, 4), context, fourier=2)),
    "sphere of a field without tangents": lambda c: OnSphere(ResidualField(3, (5, 4), c)),
    "residual": lambda context: ResidualField(3, (5, 4), context),
    "potential": lambda context: PotentialField(3, 5, 3, context),
    "divisive": lambda context: DivisiveField(3, (5, 4), context, filters=5),
    "conv": lambda context: ConvField((2, 2, 2), (3,), context, frequencies=1),
    "unet": lambda context: UNetField((1, 2, 2), 4, context, (1,), 1, 16, 1),
    "piece": lambda context: Piece(MLPField(3, (5,), context), 1, 3),
    "piecewise": lambda c: Piecewise([MLPField(3, (5,), c), ResidualField(3, (4,), c)]),
    "end time": lambda context: EndTime(MLPField(3, (5,), context), 2.0),
    "preconditioned": lambda context: Preconditioned(MLPField(3, (5,), context)),
    "preconditioned conv": lambda c: Preconditioned(ConvField((2, 2, 2), (3,), c)),
}
TRACED = ("divisive", "conv", "unet", "piecewise")  # D tangents
CONDITIONAL = [name for name in CASES if name != "mlp ignore"]


@pytest.mark.parametrize("name", CASES)
def test_fields_of_vectors_have_a_closed_form_divergence(name):
    assert isinstance(CASES[name](0), HasDivergence) == (name not in TRACED)


@pytest.fixture
def build(randomized):
    return lambda name, context=2: randomized(CASES[name](context))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("own_time", [False, True])
def test_divergence_equals_autograds(
    name, context_dim, own_time, build, points, autograd_divergence
):
    field = build(name, context_dim)
    given = points(field, own_time=own_time)
    v, div = exact_divergence(field, *given)
    torch.testing.assert_close(v, field(*given), rtol=1e-12, atol=1e-12)
    expected = autograd_divergence(field, *given)
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().min() > 1e-4


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("own_time", [False, True])
def test_result_of_a_row_does_not_depend_on_batch_shape(name, batch, own_time, build, points):
    field = build(name)
    t, x, context = points(field, batch, own_time)
    v, div = exact_divergence(field, t, x, context)
    assert v.shape == x.shape and div.shape == batch and v.dtype == div.dtype == F64
    rows = x.reshape(-1, *field.event_shape)
    t = t.expand(batch).reshape(-1)
    context = [None] * len(rows) if context is None else context.reshape(-1, field.context_dim)
    for k, (row, vk, dk) in enumerate(
        zip(rows, v.reshape(rows.shape), div.flatten(), strict=True)
    ):
        alone = exact_divergence(field, t[k], row, context[k])
        torch.testing.assert_close(alone, (vk, dk), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_scalar_time_equals_the_same_time_for_each_row(name, build, points):
    field = build(name)
    t, x, context = points(field, (2, 3))
    torch.testing.assert_close(
        exact_divergence(field, t, x, context),
        exact_divergence(field, t.expand(2, 3), x, context),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", CONDITIONAL)
@pytest.mark.parametrize("own_time", [False, True])
def test_velocity_depends_on_context_which_broadcasts(name, own_time, build, points):
    field = build(name)
    t, x, context = points(field, (2, 3), own_time)
    row = context[0]
    whole = exact_divergence(field, t, x, row.expand(2, 3, 2))
    torch.testing.assert_close(exact_divergence(field, t, x, row), whole, rtol=1e-12, atol=1e-12)
    assert (field(t, x, row) - field(t, x, context))[1].abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_divergence_equal_autograds(name, build, assert_gradients):
    assert_gradients(build(name), timeless=name not in CONDITIONAL)


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_equal_finite_differences(name, build, points):
    field = build(name, context=0)
    t, x, _ = points(field, (1,), own_time=True)
    inputs = (t.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(field, inputs)
    assert torch.autograd.gradgradcheck(field, inputs)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_reverse_mode_agree_under_vmap(name, build, points):
    field = build(name)
    t, x, context = points(field, ())

    def velocity(y):
        return field(t, y, context)

    torch.testing.assert_close(
        torch.func.jacfwd(velocity)(x), torch.func.jacrev(velocity)(x), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("time_dtype", [torch.float32, F64])
def test_results_in_float32_are_close_to_float64(name, time_dtype, build, points):
    field = build(name)
    given = points(field, own_time=True)
    exact = exact_divergence(field, *given)
    t, *rest = (None if tensor is None else tensor.float() for tensor in given)
    answers = exact_divergence(field.float(), t.to(time_dtype), *rest)
    for ours, reference in zip(answers, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_results_under_autocast_are_close_and_have_gradients(name, build, points):
    field = build(name)
    exact = exact_divergence(field, *(given := points(field, own_time=True)))
    field.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = exact_divergence(field, *(g if g is None else g.float() for g in given))
    for ours, reference in zip(answers, exact, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(  # bfloat16 holds 8 bits
            ours.double(), reference, rtol=0, atol=0.1 * scale
        )
    sum(answer.float().sum() for answer in answers).backward()
    gradients = [p.grad for p in field.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_loaded_weights_give_the_same_results(name, build, points):
    field = build(name)
    given = points(field)
    expected = exact_divergence(field, *given)
    other = CASES[name](2).double()
    assert not torch.equal(other(*given), expected[0])
    other.load_state_dict(field.state_dict())
    for twin in (copy.deepcopy(field), other):
        torch.testing.assert_close(exact_divergence(twin, *given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_nan_time_gives_nan(name, build, points):
    field = build(name)
    _, x, context = points(field)
    assert field(torch.tensor(float("nan"), dtype=F64), x, context).isnan().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_results_and_gradients_far_out_are_finite_in_float32(name, scale, build, points):
    field = build(name)
    t, x, context = points(field, own_time=True)
    field.float()
    x = (scale * x.float()).requires_grad_()
    v, div = exact_divergence(field, t.float(), x, None if context is None else context.float())
    ((v / scale).square().sum() + div.square().sum()).backward()
    gradients = [x.grad, *(p.grad for p in field.parameters() if p.grad is not None)]
    assert all(value.isfinite().all() for value in (v, div, *gradients))
