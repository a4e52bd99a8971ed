"""Autoregressive layers: dependencies, number of passes and closed forms."""

import pytest
import torch

from cnf.nets import MADE, running_rms
from cnf.transforms import Autoregressive, Inverse, RationalQuadratic

F64 = torch.float64
OPTIONS = [{}, {"divisive": 0.1}, {"divisive": 0.1, "residual": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("hidden", [(), (5,), (16, 16), (3, 9, 4)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_output_i_depends_on_previous_inputs_and_the_context(
    dim, context_dim, hidden, options, randomized, generator
):
    if "divisive" in options and not hidden:
        pytest.skip("it is in the first hidden layer")
    net = randomized(MADE(dim, 3, hidden, context_dim, **options))
    x = torch.randn(4, dim, generator=generator, dtype=F64)
    context = torch.randn(4, context_dim, generator=generator, dtype=F64) if context_dim else None
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, context).sum(-1), x)
    assert jacobian.shape == (3, dim, 4, dim)
    reached = jacobian.abs().amax((0, 2)) > 0
    assert not reached.triu().any()
    widths = [width for width in hidden if width < dim - 1]
    if not widths:  # every output sees all that it may
        assert torch.equal(reached, torch.ones(dim, dim).tril(-1).bool())
    if context is not None:
        jacobian = torch.autograd.functional.jacobian(lambda c: net(x, c).sum(-1), context)
        assert (jacobian.abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_outputs_one_by_one_equal_one_pass(context_dim, options, randomized, generator):
    net = randomized(MADE(4, 3, (7, 6, 6), context_dim, **options))
    x = torch.randn(5, 4, generator=generator, dtype=F64)
    context = torch.randn(5, context_dim, generator=generator, dtype=F64) if context_dim else None
    after, whole = net.one_by_one(context), net(x, context)
    for i in range(4):
        torch.testing.assert_close(after(x[:, :i]), whole[:, i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("map", [None, RationalQuadratic(3)], ids=["affine", "spline"])
def test_jacobian_is_lower_triangular(map, randomized, generator):
    layer = randomized(Autoregressive(5, map, hidden=(9, 9)))
    z = torch.randn(5, generator=generator, dtype=F64)
    for apply in (layer, layer.inverse):
        jacobian = torch.autograd.functional.jacobian(lambda v, apply=apply: apply(v)[0], z)
        assert (jacobian.triu(1) == 0).all()
        assert (jacobian.tril(-1).abs() > 1e-8).sum() >= 8


def test_inverse_takes_one_pass_and_forward_one_per_variable(randomized, monkeypatch):
    layer, calls = randomized(Autoregressive(4, hidden=(6,))), []
    columns = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a: (calls.append(a[1].shape), columns(*a))[1])
    z = torch.randn(3, 4, dtype=F64)
    layer.inverse(z)
    assert calls == [(6, 4), (8, 6)]  # the hidden units, and all parameters of four variables
    calls.clear()
    with torch.no_grad():
        x, ladj = layer(z)
    assert len(calls) == 8 and all(shape[0] == 2 for shape in calls[1::2])  # one variable's each
    assert x.grad_fn is None and ladj.grad_fn is None


def test_affine_layer_without_hidden_units_has_closed_form():
    # x_0 = z_0 e^a + b with the biases a, b; x_1 = z_1 + w x_0
    layer = Autoregressive(2, hidden=()).double()
    last = layer.net.layers[-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.5, 0.0, 0.2, 0.0]))  # shifts, then log-scales
        last.weight.fill_(7.0)
        last.weight[2:] = 0.0
    a = 3 * torch.tanh(torch.tensor(0.2 / 3, dtype=F64))
    x, ladj = layer(torch.tensor([[2.0, -1.0]], dtype=F64))
    first = 2 * a.exp() + 0.5
    torch.testing.assert_close(x, torch.stack([first, 7 * first - 1])[None])
    torch.testing.assert_close(ladj, a[None])


def test_gradients_of_forward_include_all_passes(randomized, generator):
    layer = randomized(Autoregressive(3, RationalQuadratic(3), hidden=(5,)))
    z = torch.randn(2, 3, generator=generator, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: layer(z), z)
    assert torch.autograd.gradcheck(lambda z: Inverse(layer)(z), z)


def test_running_rms_by_hand():
    x = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=F64)
    expected = torch.tensor([[1, 1], [10 / 2, 1 / 2], [26 / 3, 1 / 3]], dtype=F64).sqrt()
    torch.testing.assert_close(running_rms(x, 1.0), expected)
    assert torch.equal(running_rms(x[:0], 1.0), torch.ones(1, 2, dtype=F64))


def test_divisive_layer_is_equivariant_to_scale_without_its_logarithms(randomized, generator):
    """All but the first z are the same for x and 100·x, as ε goes to 0: p(x) scales with x."""
    layer = randomized(Autoregressive(5, RationalQuadratic(3), hidden=(9, 9), divisive=1e-12))
    x = torch.randn(6, 5, generator=generator, dtype=F64)
    far = layer.inverse(100 * x)[0] - layer.inverse(x)[0]
    assert far[:, 1:].abs().min() > 1e-6  # by the logarithms
    torch.nn.init.zeros_(layer.net.log_size)
    z, again = layer.inverse(x)[0], layer.inverse(100 * x)[0]
    torch.testing.assert_close(again[:, 1:], z[:, 1:])


def test_residual_layer_adds_its_input():
    net = MADE(3, 1, (6, 6), residual=True)
    first, second, last = net.layers
    torch.nn.init.zeros_(second.weight), torch.nn.init.zeros_(second.bias)
    alone = MADE(3, 1, (6,))
    alone.layers[0].load_state_dict(first.state_dict())
    alone.layers[1].load_state_dict(last.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(net(x), alone(x))  # silu(0) = 0
    plain = MADE(3, 1, (6, 6))
    plain.load_state_dict(net.state_dict())
    assert not torch.allclose(net(x), plain(x))


def test_divisive_normalization_of_nothing_or_of_angles_is_refused():
    for options, text in (
        ({"hidden": ()}, "expected a hidden layer and no period"),
        ({"period": 1.0}, "expected a hidden layer and no period"),
        ({"divisive": 0.0}, "expected divisive > 0"),
    ):
        with pytest.raises(ValueError, match=text):
            Autoregressive(2, **{"divisive": 1e-3, **options})
