"""Every transform: log-determinants against autograd in both directions, round trips, shapes."""

import inspect

import pytest
import torch
from torch import nn

from cnf import Flow
from cnf.dynamics import Solver
from cnf.fields import MLPField
from cnf.transforms import (
    LU,
    MAPS,
    TRANSFORMS,
    Autoregressive,
    Compose,
    Continuous,
    Coupling,
    Elementwise,
    Inverse,
    RationalQuadratic,
    Standardize,
)

F64 = torch.float64
TIGHT = Solver(rtol=1e-9, atol=1e-9, gradient="backprop")  # adjoint: see test_continuous.py
DIM = 3


class Residual(nn.Module):
    """A custom conditioner for couplings."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.block = nn.Linear(inputs, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.block(h.tanh()))


def continuous(context):
    return Continuous(MLPField(DIM, (8, 7), context, frequencies=1), TIGHT)


CASES = {
    "coupling": lambda context: Coupling(DIM, context_dim=context),
    "coupling, other variables unchanged": lambda context: Coupling(
        DIM, [2, 1], context_dim=context
    ),
    "coupling, custom conditioner": lambda context: Coupling(
        DIM,
        context_dim=context,
        transformer=RationalQuadratic(3),
        conditioner=lambda i, o: Residual(i, o),
    ),
    "autoregressive, divisive and residual": lambda context: Autoregressive(
        DIM, "logistic-mixture", hidden=(7, 7, 7), context_dim=context, divisive=0.1, residual=True
    ),
    "standardize": lambda context: Standardize((DIM,)),
    "continuous": continuous,
    "compose": lambda context: Compose(
        [Coupling(DIM, context_dim=context), Standardize((DIM,)), Coupling(DIM, [1])]
    ),
    "inverse": lambda context: Inverse(Coupling(DIM, context_dim=context)),
    "nested": lambda context: Inverse(
        Compose([continuous(context), Inverse(Coupling(DIM, [0, 2]))])
    ),
}
for scheme in (Coupling, Autoregressive, Elementwise):
    for name, build in MAPS.items():
        CASES[f"{scheme.__name__}, {name}"] = lambda context, scheme=scheme, build=build: scheme(
            DIM, transformer=build(), hidden=(8, 7), context_dim=context
        )


def example(name, context):
    """A registered transform, from its example, so that every new one is tested."""
    build = TRANSFORMS.examples[name]
    conditional = "context_dim" in inspect.signature(build).parameters
    return build(DIM, context_dim=context) if conditional else build(DIM)


CASES |= {
    f"example: {name}": lambda context, name=name: example(name, context)
    for name in TRANSFORMS.examples
}
SOLVED = ("continuous", "nested")  # by a solver with rtol 1e-9
DIRECTIONS = ["forward", "inverse"]
KEEPS_VOLUME = ("identity", "permutation", "householder", "rotation", "additive")


@pytest.fixture
def case(randomized, generator):
    def make(name, context=2, batch=(5,), direction="forward"):
        """A transform in eval mode, an input of its direction, and a context."""
        transform = randomized(CASES[name](context)).eval()
        value = torch.randn(*batch, DIM, generator=generator, dtype=F64)
        condition = None
        if transform.context_dim:
            condition = torch.randn(*batch, context, generator=generator, dtype=F64)
        if direction == "inverse":  # not every point need be a value of the transform
            value = transform(value, condition)[0].detach()
        return transform, value, condition

    return make


def row(context, k):
    return None if context is None else context[k]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_ladj_is_autograd_slogdet(name, context, direction, case):
    transform, value, condition = case(name, context, direction=direction)
    apply = getattr(transform, direction)
    _, ladj = apply(value, condition)
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda y, k=k: apply(y, row(condition, k))[0], value[k]
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        off = 1e-7 if name in SOLVED else 1e-10
        torch.testing.assert_close(ladj[k], expected, rtol=0, atol=off)
    if name.endswith(KEEPS_VOLUME):
        assert (ladj == 0).all()
    else:
        assert ladj.abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_round_trip_recovers_the_input_and_negates_ladj(name, case):
    transform, value, condition = case(name)
    x, forward = transform(value, condition)
    z, inverse = transform.inverse(x, condition)
    off = 1e-7 if name in SOLVED else 1e-10
    torch.testing.assert_close(z, value, rtol=0, atol=off)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=off)
    moved = (x - value).abs().max() > 1e-2
    assert moved or "identity" in name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_result_of_a_row_does_not_depend_on_batch_shape(name, batch, direction, case):
    transform, value, condition = case(name, batch=batch, direction=direction)
    y, ladj = getattr(transform, direction)(value, condition)
    assert y.shape == value.shape and ladj.shape == batch and y.dtype == ladj.dtype == F64
    rows = value.reshape(-1, DIM)
    conditions = None if condition is None else condition.reshape(-1, condition.shape[-1])
    for k in range(min(len(rows), 3)):
        yk, lk = getattr(transform, direction)(rows[k], row(conditions, k))
        torch.testing.assert_close(y.reshape(-1, DIM)[k], yk, rtol=0, atol=1e-7)
        torch.testing.assert_close(ladj.reshape(-1)[k], lk, rtol=0, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CASES)
def test_empty_batch_stays_empty(name, direction, case):
    transform, value, condition = case(name, batch=(0,), direction=direction)
    y, ladj = getattr(transform, direction)(value, condition)
    assert y.shape == (0, DIM) and ladj.shape == (0,)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CASES)
def test_input_is_not_modified(name, direction, case):
    transform, value, condition = case(name, direction=direction)
    before = value.clone(), None if condition is None else condition.clone()
    getattr(transform, direction)(value, condition)
    assert torch.equal(value, before[0])
    assert condition is None or torch.equal(condition, before[1])


CONDITIONAL = [name for name in CASES if CASES[name](2).context_dim]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CONDITIONAL)
def test_context_broadcasts_has_an_effect_and_a_gradient(name, direction, case):
    transform, value, condition = case(name, direction=direction)
    apply = getattr(transform, direction)
    shared = condition[0].clone().requires_grad_()
    y, ladj = apply(value, shared)
    other, _ = apply(value, condition[1])
    assert (y - other).abs().max() > 1e-3
    several, _ = apply(value.expand(3, 5, DIM), condition[:1])
    torch.testing.assert_close(several, y.expand(3, 5, DIM), rtol=0, atol=1e-7)
    for output in (y.sum(), ladj.sum()):
        if output.requires_grad:
            (grad,) = torch.autograd.grad(output, shared, retain_graph=True)
            assert grad.abs().min() > 1e-5
    assert ladj.requires_grad or name.endswith(KEEPS_VOLUME)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [name for name in CASES if [*CASES[name](2).parameters()]])
def test_every_parameter_gets_a_gradient(name, direction, case):
    transform, value, condition = case(name, direction=direction)
    y, ladj = getattr(transform, direction)(value, condition)
    (y.square().sum() + ladj.sum()).backward()
    for key, parameter in transform.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_affine_coupling_has_closed_form():
    # keep 0; x₁ = z₁·exp(s) + m with m, s = the net's bias: ladj = 3·tanh(s/3)
    coupling = Coupling(2, hidden=()).double()
    with torch.no_grad():
        coupling.net.layers[-1].bias.copy_(torch.tensor([0.5, -1.5]))
    x, ladj = coupling(torch.tensor([[0.25, 2.0]], dtype=F64))
    s = 3 * torch.tanh(torch.tensor(-0.5, dtype=F64))
    torch.testing.assert_close(x, torch.stack([0 * s + 0.25, 2 * s.exp() + 0.5])[None])
    torch.testing.assert_close(ladj, s[None])


def test_coupling_leaves_the_chosen_variables_unchanged(case):
    transform, value, condition = case("coupling, other variables unchanged")
    x, _ = transform(value, condition)
    assert torch.equal(x[:, 1:], value[:, 1:]) and not torch.isclose(x[:, 0], value[:, 0]).any()


def test_coupling_in_one_dimension_requires_a_context(randomized, generator):
    transform = randomized(Coupling(1, context_dim=2))
    z = torch.randn(4, 1, generator=generator, dtype=F64)
    c = torch.randn(4, 2, generator=generator, dtype=F64)
    x, ladj = transform(z, c)
    torch.testing.assert_close(transform.inverse(x, c)[0], z)
    assert ladj.abs().min() > 1e-4
    with pytest.raises(ValueError, match="two dimensions or more, or a context.*nsf-ar"):
        Coupling(1)


def test_conditioner_with_wrong_number_of_outputs_is_refused():
    for wrong in (-1, 1, 2):
        coupling = Coupling(4, conditioner=lambda i, o, wrong=wrong: nn.Linear(i, o + wrong))
        with pytest.raises(ValueError, match=f"to give 4 numbers for each row, got {4 + wrong}"):
            coupling(torch.zeros(5, 4))


@pytest.mark.parametrize("keep", [(), (0, 1), (5,), (0, 0)], ids=str)
def test_coupling_refuses_invalid_indices(keep):
    with pytest.raises(ValueError, match="Coupling"):
        Coupling(2, keep)


def test_compose_applies_the_first_transform_first():
    shift, scale = Standardize((1,)).double(), Standardize((1,)).double()
    shift.loc.fill_(1.0)
    scale.scale.fill_(10.0)
    z = torch.tensor([2.0], dtype=F64)
    assert Compose([shift, scale])(z)[0].item() == 30
    assert Compose([scale, shift])(z)[0].item() == 21
    assert Inverse(Compose([shift, scale]))(z)[0].item() == pytest.approx(-0.8)


def test_compose_refuses_incompatible_transforms():
    with pytest.raises(ValueError, match="at least one transform"):
        Compose([])
    with pytest.raises(ValueError, match=r"one event_dims for all, got \[1, 3\]"):
        Compose([Standardize((2,)), Standardize((1, 4, 4))])
    with pytest.raises(ValueError, match=r"for all, got Coupling of \(2,\) and LU of \(3,\)"):
        Compose([Coupling(2), LU(3)])
    with pytest.raises(ValueError, match=r"one context_dim for all, got \[1, 2\]"):
        Compose([Coupling(2, context_dim=1), LU(2), Coupling(2, context_dim=2)])
    with pytest.raises(ValueError, match=r"transform of \(2,\), got Inverse of \(3,\)"):
        Flow(None, Inverse(Coupling(3)), event_shape=(2,))
    with pytest.raises(ValueError, match=r"transform of \(2,\), got Standardize of \(3,\)"):
        Flow(None, Coupling(2), Standardize((3,)), event_shape=(2,))


@pytest.mark.parametrize("name", CASES)
def test_error_names_wrong_shapes_and_missing_contexts(name, case):
    transform, value, condition = case(name)
    for got in (value[:, :1], value.repeat(1, 2)) if transform.event_shape else ():
        for direction in (transform.forward, transform.inverse):
            with pytest.raises(ValueError, match=r"ward: expected z of|rse: expected x of"):
                direction(got, condition)
    for direction in (transform.forward, transform.inverse) if transform.context_dim else ():
        with pytest.raises(ValueError, match=r"(forward|inverse): expected a context .* None"):
            direction(value)
        with pytest.raises(ValueError, match=r"expected context of shape \(\*, 2\), got \(5, 1\)"):
            direction(value, condition[:, :1])
