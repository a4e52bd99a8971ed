"""Layers have the same density as zuko's for the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
import zuko

import cnf
from cnf.transforms import Autoregressive, Compose, Coupling, Inverted, Permutation
from cnf.transforms.elementwise import Affine
from cnf.transforms.splines import RationalQuadratic

DIM, CONTEXT, BINS, HIDDEN = 4, 2, 5, (16, 16)
NET = {"hidden": HIDDEN, "context_dim": CONTEXT, "activation": "relu"}
SOFT = math.log(1e-3)  # zuko bends raw numbers: a / (1 + |a / log 1e-3|)


def affine(raw):
    shift, scale = raw
    return shift, scale / (1 + (scale / SOFT).abs())


def spline(raw):
    widths, heights, slopes = raw.split([BINS, BINS, BINS - 1])
    sizes = [10 * torch.softmax(v / (1 + (2 * v / SOFT).abs()), 0) for v in (widths, heights)]
    slopes = F.pad((slopes / (1 + (slopes / SOFT).abs())).flatten(1), (0, 0, 1, 1))
    return torch.stack(sizes), slopes.unflatten(1, raw.shape[1:]).exp()


MAPS = {
    "affine": (lambda: Inverted(Affine()), affine, {}),
    "spline": (lambda: Inverted(RationalQuadratic(BINS)), spline, {"bins": BINS}),
}


def carry(theirs, ours, columns, rows):
    """The layers' weights, with the first one's columns and the last one's rows rearranged."""
    linears = [layer for layer in theirs if hasattr(layer, "weight")]
    for layer, source in zip(ours, linears, strict=True):
        weight, bias = source.weight * getattr(source, "mask", 1.0), source.bias
        if source is linears[0]:
            weight = weight[:, columns]
        if source is linears[-1]:
            weight, bias = weight[rows], bias[rows]
        layer.load_state_dict({"weight": weight, "bias": bias})
        if hasattr(layer, "mask"):
            layer.mask.fill_(1.0)  # what zuko masks is zero already


def rearranged(variables, size):
    """zuko has a variable's numbers together; here a number's variables are."""
    return [variable * size + number for number in range(size) for variable in variables]


def autoregressive(flow, kind):
    make, parametrize, _ = MAPS[kind]
    parts = []
    for layer in flow.transform.transforms:
        order = layer.order.argsort().tolist()
        ours = Autoregressive(DIM, make(), parametrize=parametrize, **NET)
        columns = [DIM + k for k in range(CONTEXT)] + order
        carry(layer.hyper, ours.net.layers, columns, rearranged(order, ours.transformer.size))
        # zuko's variables in the order in which they are seen: x[order] is what our layer takes
        parts = [Permutation(DIM, layer.order.tolist()), ours, Permutation(DIM, order), *parts]
    return parts


def coupling(flow, kind):
    make, parametrize, _ = MAPS[kind]
    parts = []
    for layer in flow.transform.transforms:
        keep = layer.mask.nonzero().flatten().tolist()
        ours = Coupling(DIM, keep, make(), parametrize=parametrize, **NET)
        rows = rearranged(range(DIM - len(keep)), ours.transformer.size)
        carry(layer.hyper, ours.net.layers, range(len(keep) + CONTEXT), rows)
        parts = [ours, *parts]
    return parts


def theirs(scheme, kind):
    shared = {"hidden_features": HIDDEN}
    if scheme == "autoregressive":
        made = zuko.flows.NSF if kind == "spline" else zuko.flows.MAF
        return made(DIM, CONTEXT, transforms=3, **shared, **MAPS[kind][2])
    if kind == "spline":
        shared["univariate"] = zuko.transforms.MonotonicRQSTransform
        shared["shapes"] = [(BINS,), (BINS,), (BINS - 1,)]
    return zuko.flows.RealNVP(DIM, CONTEXT, transforms=3, **shared)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("scheme", ["autoregressive", "coupling"])
def test_density_equals_zukos_for_the_same_weights(scheme, kind, generator):
    peer = theirs(scheme, kind)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    parts = {"autoregressive": autoregressive, "coupling": coupling}[scheme](peer, kind)
    flow = cnf.Flow(None, Compose(parts), event_shape=(DIM,))
    x = 1.5 * torch.randn(50, DIM, generator=generator)
    context = torch.randn(50, CONTEXT, generator=generator)
    with torch.no_grad():
        expected = peer(context).log_prob(x)
        torch.testing.assert_close(flow.log_prob(x, context), expected, rtol=1e-5, atol=1e-5)
        assert (expected - peer(context.flip(0)).log_prob(x)).abs().max() > 0.1
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
        assert (expected - normal).abs().max() > 1
