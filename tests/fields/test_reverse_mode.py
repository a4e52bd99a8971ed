"""Exact divergence by reverse mode of fields without forward mode in torch."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cnf.dynamics import REGULARIZERS, Solver, explain
from cnf.dynamics.regularizers import Point
from cnf.fields import Adapter
from cnf.fields.base import exact_divergence
from cnf.fields.trace import has_forward_mode, jacobian_columns
from cnf.transforms import Continuous

F64 = torch.float64


class Attention(nn.Module):
    """The D coordinates of a point as D tokens."""

    def __init__(self):
        super().__init__()
        self.rise, self.fall = nn.Linear(2, 4), nn.Linear(4, 1)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, t, x):
        tokens = torch.stack([x, t.unsqueeze(-1).expand_as(x)], -1)
        return self.fall(self.encoder(self.rise(tokens))).squeeze(-1)


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Custom(nn.Module):
    def __init__(self, apply):
        super().__init__()
        self.apply_, self.linear, self.last = apply, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, t, x):
        return self.last(self.apply_(self.linear(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.last = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, t, x):
        return self.last(self.gru(x.unsqueeze(-1))[0]).squeeze(-1)


NETS = {
    "attention": Attention,
    "custom function": lambda: Custom(Sine.apply),
    "checkpoint": lambda: Custom(lambda h: checkpoint(torch.sin, h, use_reentrant=False)),
    "recurrent": Recurrent,
}


@pytest.fixture
def field_and_x(randomized, generator):
    def build(name):
        x = torch.randn(4, 3, generator=generator, dtype=F64)
        return randomized(Adapter(NETS[name](), (3,))), x

    return build


def jacobians(field, t, x):
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda y: field(t, y[None])[0], row) for row in x]
    )


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_divergence_is_the_trace_of_autograds_jacobian(name, train, field_and_x):
    (field, x), t = field_and_x(name), torch.tensor(0.3, dtype=F64)
    field.train(train)
    brute = jacobians(field, t, x)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            v, div = exact_divergence(field, t, x)
            squared = REGULARIZERS["jacobian"](Point(field, t, x, None, v))
            _, columns = jacobian_columns(lambda x: field(t, x), x, field=field)
        torch.testing.assert_close(v, field(t, x))
        torch.testing.assert_close(div, brute.diagonal(dim1=1, dim2=2).sum(-1))
        torch.testing.assert_close(squared, brute.square().sum((1, 2)))
        torch.testing.assert_close(columns, brute.permute(2, 0, 1))


@pytest.mark.parametrize("name", NETS)
def test_gradients_of_the_likelihood_are_correct_in_every_gradient_mode(name, field_and_x):
    field, x = field_and_x(name)
    weights = list(field.parameters())

    def loss(gradient):
        flow = Continuous(field, Solver("rk4", steps=4, gradient=gradient))
        return sum(part.square().sum() for part in flow.inverse(x))

    exact = torch.autograd.grad(loss("backprop"), weights, materialize_grads=True)
    again = torch.autograd.grad(loss("checkpoint"), weights, materialize_grads=True)
    torch.testing.assert_close(again, exact)
    adjoint = torch.autograd.grad(loss("adjoint"), weights, materialize_grads=True)
    torch.testing.assert_close(adjoint, exact, rtol=2e-2, atol=2e-3)  # the error of four steps
    weight, k = max(enumerate(exact), key=lambda pair: pair[1].abs().max())[0], (0,)
    at, h = weights[weight].data, 1e-5
    entry = at.view(-1)[k].item()
    found = []
    for shift in (h, -h):
        at.view(-1)[k] = entry + shift
        found.append(loss("backprop").item())
    at.view(-1)[k] = entry
    slope = (found[0] - found[1]) / (2 * h)
    assert exact[weight].view(-1)[k].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_explain_says_reverse_mode(field_and_x):
    for name in ("attention", "custom function"):
        field, _ = field_and_x(name)
        assert explain(field, rows=4).startswith("Adapter: 3 products in reverse mode")


def test_out_of_memory_is_not_taken_for_missing_forward_mode():
    def full(x):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        has_forward_mode(torch.nn.Identity(), full, torch.ones(2, 2))
