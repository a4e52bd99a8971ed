"""Any module as a vector field."""

import pytest
import torch
from torch import nn

import cnf
from cnf.fields import Adapter, HasDivergence

F64 = torch.float64


class Net(nn.Module):
    """2x + 3t (+ 5·Σc), with arguments in the given order."""

    def __init__(self, time_first):
        super().__init__()
        self.time_first = time_first

    def forward(self, first, second, context=None):
        t, x = (first, second) if self.time_first else (second, first)
        assert t.shape == x.shape[: t.dim()]
        y = 2 * x + 3 * t.reshape(*t.shape, *[1] * (x.dim() - t.dim()))
        return y if context is None else y + 5 * context.sum(-1, keepdim=True)


@pytest.mark.parametrize("call", ["t, x", "x, t"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("batched_time", [False, True])
def test_net_gets_expanded_time_and_arguments_in_the_given_order(call, batch, batched_time):
    field = Adapter(Net(call == "t, x"), (2,), call=call)
    t = torch.full(batch if batched_time else (), 0.5, dtype=F64)
    v = field(t, torch.full((*batch, 2), 10.0, dtype=F64))
    assert v.shape == (*batch, 2) and v.dtype == F64
    assert (v == 21.5).all()


@pytest.mark.parametrize("call", ["t, x", "x, t"])
def test_net_gets_the_broadcast_context_last(call):
    field = Adapter(Net(call == "t, x"), (2,), context_dim=3, call=call)
    v = field(torch.tensor(0.5), torch.full((4, 2), 10.0), torch.ones(3))
    assert (v == 36.5).all()


def test_concat_joins_x_t_context_in_that_order():
    net = nn.Linear(2 + 1 + 2, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 10, 100, 1000, 10_000]] * 2))
    field = Adapter(net, (2,), context_dim=2, call="concat")
    x, c = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[4.0, 5.0]], dtype=F64)
    v = field(torch.tensor(3.0, dtype=F64), x, c)
    assert v.tolist() == [[54321.0, 54321.0]]


def test_images_are_events():
    field = Adapter(Net(True), (1, 4, 4))
    v = field(torch.tensor(0.5), torch.ones(5, 1, 4, 4))
    assert v.shape == (5, 1, 4, 4) and (v == 3.5).all()


def test_parameters_of_the_net_are_registered_and_get_gradients():
    net = nn.Linear(3, 2)
    field = Adapter(net, (2,), call="concat")
    assert list(field.parameters()) == list(net.parameters())
    field(torch.tensor(0.5), torch.ones(4, 2)).sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())


def test_adapter_has_no_closed_form_divergence():
    assert not isinstance(Adapter(nn.Identity(), (2,)), HasDivergence)


def test_unknown_call_is_refused():
    with pytest.raises(ValueError, match="expected call to be one of 't, x'"):
        Adapter(nn.Identity(), (2,), call="t,x")


def test_error_explains_a_net_with_wrong_shapes():
    x, t = torch.zeros(4, 2), torch.tensor(0.5)
    with pytest.raises(ValueError, match="Linear to accept x and t in one tensor of 3 columns"):
        Adapter(nn.Linear(2, 2), (2,), call="concat")(t, x)
    with pytest.raises(ValueError, match=r"velocity of x's shape \(4, 2\), got a tuple"):
        Adapter(Twice(), (2,), call="concat")(t, x)
    with pytest.raises(TypeError, match="field to be a VectorField, got a Linear; wrap your own"):
        cnf.transforms.Continuous(nn.Linear(3, 2))


class Twice(nn.Module):
    def forward(self, x):
        return x, x
