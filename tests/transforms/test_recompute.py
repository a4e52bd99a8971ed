"""Recomputation of activations by inversion: values, gradients and memory."""

import copy
import weakref

import pytest
import torch

from cnf.dynamics import Solver
from cnf.fields import MLPField
from cnf.transforms import (
    LU,
    TRANSFORMS,
    ActNorm,
    Autoregressive,
    BatchNorm,
    Compose,
    Continuous,
    Coupling,
    Inverse,
    RationalQuadratic,
)
from cnf.transforms.normalization import initializing

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
def test_values_and_gradients_equal_those_without_recomputation(
    context, direction, randomized, generator
):
    plain = randomized(Compose(stack(context)))
    recomputed = Compose(list(plain.transforms), recompute=True)
    value = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    condition = torch.randn(5, 2, generator=generator, dtype=F64, requires_grad=True)
    leaves = [value, *plain.parameters(), *([condition] if context else [])]
    for grad in assert_agreement(
        plain, recomputed, direction, value, condition if context else None, leaves
    ):
        assert grad.abs().max() > 1e-3


def assert_agreement(plain, recomputed, direction, value, condition, leaves):
    """Assert equal values, and gradients up to 1e-6; return the plain gradients."""
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = []
    for transform in (plain, recomputed):
        y, ladj = getattr(transform, direction)(value, condition)
        loss = (weight * y).sum() + (weight[:, 0] * ladj).sum()
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        found.append((y, ladj, grads))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=0)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-6, atol=1e-6)
    return found[0][2]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", [name for name in TRANSFORMS.examples if name != "batchnorm"])
def test_every_registered_transform_can_be_recomputed(name, direction, randomized, generator):
    layer = randomized(TRANSFORMS.examples[name](3))
    value = torch.randn(5, 3, generator=generator, dtype=F64)
    if direction == "inverse":
        value = layer(value)[0].detach()
    leaves = [value.requires_grad_(), *layer.parameters()]
    assert_agreement(
        Compose([layer]), Compose([layer], recompute=True), direction, value, None, leaves
    )


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", ["nice", "glow", "maf", "nsf", "planar"])
def test_transform_of_every_discrete_model_can_be_recomputed(
    name, direction, small_flow, generator
):
    plain = small_flow(name, dim=3, gain=0.5).transform
    recomputed = Compose(list(plain.transforms), recompute=True)
    value = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    assert_agreement(plain, recomputed, direction, value, None, [value, *plain.parameters()])


def test_first_batch_initializes_actnorm_as_without_recomputation(generator):
    value = 3 * torch.randn(50, 3, generator=generator, dtype=F64) + 7
    torch.manual_seed(0)
    plain = Compose([Coupling(3), ActNorm((3,)), LU(3, rotated=True), ActNorm((3,))]).double()
    recomputed = Compose(list(copy.deepcopy(plain).transforms), recompute=True)
    for transform in (plain, recomputed):
        with torch.no_grad(), initializing(transform):
            transform.inverse(value)
        z, ladj = transform.inverse(value)
        (z.square().sum() - ladj.sum()).backward()
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-10)
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one.grad, other.grad)
    assert recomputed.transforms[1].initialized and recomputed.transforms[3].initialized


def test_backward_pass_recomputes_under_autocast_of_forward_pass(generator):
    layers = [Coupling(3, [k % 2], hidden=(32,)) for k in range(3)]
    dtypes = []
    for layer in layers:

        def columns(seen, own=layer.net.columns):
            raw = own(seen)
            dtypes.append(raw.dtype)
            return raw

        layer.net.columns = columns
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.randn(50, 3, generator=generator)
        z, ladj = Compose(layers, recompute=True).inverse(value)
    (z.square().sum() - ladj.sum()).backward()  # outside, as torch advises
    assert dtypes == 9 * [torch.bfloat16]  # there, undone, and there again


def test_shared_layer_accumulates_its_gradients(randomized, generator):
    layer = randomized(Coupling(2, hidden=(5,)))
    value = torch.randn(4, 2, generator=generator, dtype=F64)
    grads = []
    for recompute in (False, True):
        y, ladj = Compose([layer, LU(2).double(), layer], recompute=recompute)(value)
        grads.append(torch.autograd.grad(y.sum() + ladj.sum(), list(layer.parameters())))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


class SavedTensor:
    """A tensor that the graph saves."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # or an output would hold the graph that holds it


def saved_bytes(transform, value):
    """Bytes that the graph saves for the backward pass, without parameters."""
    own, packed = {p.data_ptr() for p in transform.parameters()}, weakref.WeakSet()

    def pack(tensor):
        saved = SavedTensor(tensor)
        packed.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = transform.inverse(value)
    storages = {
        saved.tensor.untyped_storage() for saved in packed if saved.tensor.data_ptr() not in own
    }
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert output[0].requires_grad
    return sum(sizes.values())


def test_saved_memory_does_not_grow_with_number_of_layers():
    value, sizes = torch.randn(100, 2), {}
    for recompute in (False, True):
        for layers in (4, 32):
            transform = Compose([Coupling(2) for _ in range(layers)], recompute=recompute)
            sizes[recompute, layers] = saved_bytes(transform, value)
    assert sizes[False, 32] > 7 * sizes[False, 4]
    assert sizes[True, 32] == sizes[True, 4] <= 100 * 2 * 4


def test_transform_without_inverse_in_train_mode_is_refused():
    with pytest.raises(ValueError, match="recompute=True needs, got BatchNorm"):
        Compose([Coupling(2), BatchNorm(2)], recompute=True)
    with pytest.raises(ValueError, match="recompute=True needs, got Compose"):
        Compose([Coupling(2), Compose([BatchNorm(2)])], recompute=True)
    with pytest.raises(ValueError, match="recompute=True needs, got Inverse"):
        Compose([Inverse(BatchNorm(2))], recompute=True)
