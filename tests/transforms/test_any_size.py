"""Layers of random type and size, drawn by hypothesis, and inputs at float32's limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnf.transforms import (
    MAPS,
    TRANSFORMS,
    Autoregressive,
    CircularSpline,
    Coupling,
    Elementwise,
    Inverted,
    RationalQuadratic,
)

F64 = torch.float64
SCHEMES = (Coupling, Autoregressive, Elementwise)
SPLINES = (RationalQuadratic, CircularSpline)
# Without batchnorm, whose running statistics are not parameters.
FREE = [name for name in TRANSFORMS.examples if name != "batchnorm"]


@st.composite
def maps(draw):
    build = draw(st.sampled_from([*MAPS.values()]))
    bound = draw(st.sampled_from([0.5, 3.0, 20.0]))
    map = build(draw(st.integers(1, 64)), bound) if build in SPLINES else build()
    return draw(st.sampled_from([map, Inverted(map)]))


@st.composite
def layers(draw):
    """A layer of random type, map, number of variables, network and context."""
    dim, context = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    hidden = draw(st.lists(st.integers(1, 9), max_size=3))
    scheme = draw(st.sampled_from(SCHEMES))
    if scheme is Coupling and dim == 1 and not context:
        context = 1  # a variable alone has nothing else to depend on
    return scheme(dim, transformer=draw(maps()), hidden=hidden, context_dim=context), dim, context


def randomized_module(module, scale, generator):
    """The module in float64 with random parameters of the given scale."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            draw = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.copy_(scale * draw / fan_in**0.5)
    return module.eval()


def agrees_with_autograd(transform, z, condition):
    """Assert that log|det| equals autograd's at each point, and that the round trip is exact."""
    x, forward = transform(z, condition)
    again, inverse = transform.inverse(x, condition)
    assert x.dtype == forward.dtype == inverse.dtype == F64
    assert x.shape == again.shape == z.shape and forward.shape == z.shape[:-1] == inverse.shape
    for k in range(len(z)):
        c = None if condition is None else condition[k]
        jacobian = torch.autograd.functional.jacobian(lambda y, c=c: transform(y, c)[0], z[k])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        # What rounding costs: each direction multiplies it by its Jacobian.
        stretch = torch.linalg.svdvals(jacobian)
        worse = ((1 + stretch.max()) * (1 + 1 / stretch.min()) * (1 + z[k].abs().max())).item()
        if math.isinf(worse):  # autograd's slope is 0, whose logarithm is no reference
            assert all(value[k].isfinite().all() for value in (x, again, forward, inverse))
            continue
        torch.testing.assert_close(forward[k], expected, rtol=1e-8, atol=1e-11 * worse)
        assert (again[k] - z[k]).abs().max() <= 1e-11 * worse
        assert abs(inverse[k] + forward[k]) <= 1e-10 * worse


@given(layer=layers(), scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]), seed=st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_layers_with_any_elementwise_map_agree_with_autograd(layer, scale, seed):
    transform, dim, context = layer
    generator = torch.Generator().manual_seed(seed)
    randomized_module(transform, scale, generator)
    z = 2 * torch.randn(3, dim, generator=generator, dtype=F64)
    spline = getattr(transform.transformer, "transformer", transform.transformer)
    if isinstance(spline, CircularSpline):  # other numbers come back less whole turns
        z = z.tanh() * spline.curve.bound
    condition = torch.randn(3, context, generator=generator, dtype=F64) if context else None
    agrees_with_autograd(transform, z, condition)


@pytest.mark.parametrize("name", FREE)
@given(dim=st.integers(2, 7), scale=st.sampled_from([0.0, 0.1, 1.0]), seed=st.integers(0, 2**20))
@settings(max_examples=15, deadline=None)
def test_layers_of_any_size_agree_with_autograd(name, dim, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    transform = randomized_module(TRANSFORMS.examples[name](dim), scale, generator)
    z = torch.randn(3, dim, generator=generator, dtype=F64)
    agrees_with_autograd(transform, z, None)


EVERY = {f"example: {name}": build for name, build in TRANSFORMS.examples.items()} | {
    f"{scheme.__name__}, {name}": lambda dim, scheme=scheme, build=build: scheme(
        dim, transformer=build(), hidden=(8,)
    )
    for scheme in SCHEMES
    for name, build in MAPS.items()
}


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", EVERY)
def test_results_are_finite_at_the_limits_of_float32(name, direction, generator):
    layer = randomized_module(EVERY[name](2), 1.0, generator).float()
    sizes = torch.logspace(-30, 30, 61)
    sizes = torch.cat([-sizes, torch.zeros(1), sizes])
    value = torch.cartesian_prod(sizes, sizes).requires_grad_()
    y, ladj = getattr(layer, direction)(value)
    assert y.dtype == ladj.dtype == torch.float32
    low, high = getattr(layer, "support", (-1e31, 1e31))
    inside = direction == "forward" or (value >= low) & (value <= high)
    inside = torch.as_tensor(inside).all(-1)
    assert torch.isfinite(y).all() and torch.isfinite(ladj[inside]).all()
    assert (ladj[~inside] == -torch.inf).all()
    for output in ((y / 1e30).sum(), ladj.sum()):
        if output.requires_grad:
            inputs = [value, *layer.parameters()]
            grads = torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True)
            assert all(grad is None or torch.isfinite(grad).all() for grad in grads)
