"""Activations recomputed by inversion: the same values and gradients, in memory that stays."""

import pytest
import torch

from cnf.dynamics import Solver
from cnf.fields import MLPField
from cnf.transforms import (
    LU,
    ActNorm,
    Autoregressive,
    BatchNorm,
    Compose,
    Continuous,
    Coupling,
    Inverse,
    RationalQuadratic,
)

F64 = torch.float64


def stack(context):
    solver = Solver(rtol=1e-11, atol=1e-11, gradient="backprop")
    return [
        Coupling(3, hidden=(7,), context_dim=context),
        LU(3),
        Autoregressive(3, RationalQuadratic(3), hidden=(7,)),
        ActNorm((3,)),
        Inverse(Coupling(3, [1], hidden=(7,), context_dim=context)),
        Continuous(MLPField(3, (6,), frequencies=0), solver),
    ]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("context", [0, 2])
def test_values_and_gradients_are_those_of_plain_backward(
    context, direction, randomised, generator
):
    kept = randomised(Compose(stack(context))).eval()
    small = Compose(list(kept.transforms), recompute=True)
    value = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    condition = torch.randn(5, 2, generator=generator, dtype=F64, requires_grad=True)
    leaves = [value, *kept.parameters(), *([condition] if context else [])]
    weight = torch.randn(5, 3, generator=generator, dtype=F64)
    found = []
    for transform in (kept, small):
        y, ladj = getattr(transform, direction)(value, condition if context else None)
        loss = (weight * y).sum() + (weight[:, 0] * ladj).sum()
        found.append((y, ladj, torch.autograd.grad(loss, leaves)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for plain, recomputed in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)
        assert plain.abs().max() > 1e-3


def test_a_shared_layer_gets_the_sum_of_its_gradients(randomised, generator):
    layer = randomised(Coupling(2, hidden=(5,)))
    value = torch.randn(4, 2, generator=generator, dtype=F64)
    grads = []
    for recompute in (False, True):
        y, ladj = Compose([layer, LU(2).double(), layer], recompute=recompute)(value)
        grads.append(torch.autograd.grad(y.sum() + ladj.sum(), list(layer.parameters())))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def saved(transform, value):
    """Bytes that the graph keeps for the backward pass, parameters aside."""
    kept, own = {}, {p.data_ptr() for p in transform.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transform.inverse(value)
    return sum(kept.values())


def test_what_is_kept_does_not_grow_with_the_layers():
    value, sizes = torch.randn(100, 2), {}
    for recompute in (False, True):
        for layers in (4, 32):
            transform = Compose([Coupling(2) for _ in range(layers)], recompute=recompute)
            sizes[recompute, layers] = saved(transform, value)
    assert sizes[False, 32] > 7 * sizes[False, 4]
    assert sizes[True, 32] == sizes[True, 4] <= 100 * 2 * 4


def test_what_has_no_inverse_in_training_is_refused():
    with pytest.raises(ValueError, match="recompute=True, but in training BatchNorm"):
        Compose([Coupling(2), BatchNorm(2)], recompute=True)
    with pytest.raises(ValueError, match="recompute=True, but in training Compose"):
        Compose([Inverse(BatchNorm(2)), Compose([BatchNorm(2)])][1:], recompute=True)
