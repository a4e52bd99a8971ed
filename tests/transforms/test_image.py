"""Image flows: squeezing, 1×1 convolutions, couplings, and Glow as a bijection."""

import pytest
import torch
import torch.nn.functional as F

import cnf
from cnf.nets import ResidualConvNet
from cnf.transforms import (
    LU,
    CheckerboardCoupling,
    ConvCoupling,
    Coupling,
    OnChannels,
    PerPixel,
    RationalQuadratic,
    Squeeze,
)

F64 = torch.float64
CASES = {
    "squeeze": lambda context: Squeeze(),
    "pixels": lambda context: PerPixel(LU(4)),
    "coupling": lambda context: ConvCoupling(4, 1, hidden=(5, 6), context_dim=context),
    "spline coupling": lambda context: ConvCoupling(
        4, 2, RationalQuadratic(3), hidden=(5, 6), context_dim=context
    ),
    "residual coupling": lambda context: ConvCoupling(
        4, 3, context_dim=context, conditioner=lambda i, o: ResidualConvNet(i, o, (5, 5))
    ),
    "checkerboard": lambda context: CheckerboardCoupling(4, hidden=(5, 6), context_dim=context),
    "odd checkerboard": lambda context: CheckerboardCoupling(
        4,
        True,
        RationalQuadratic(3),
        context_dim=context,
        conditioner=lambda i, o: ResidualConvNet(i, o, (5,)),
    ),
    "part": lambda context: OnChannels(ConvCoupling(3, 1, hidden=(5, 6), context_dim=context), 3),
}


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_ladj_is_autograd_slogdet_and_round_trip_recovers_the_image(
    name, context, batch, direction, randomized, generator
):
    transform = randomized(CASES[name](context), gain=0.3).eval()
    value = torch.randn(*batch, 4, 2, 4, generator=generator, dtype=F64)
    condition = None
    if transform.context_dim:
        condition = torch.randn(*batch, context, generator=generator, dtype=F64)
    if direction == "inverse":
        value = transform(value, condition)[0].detach()
    other = {"forward": transform.inverse, "inverse": transform.forward}[direction]
    apply = getattr(transform, direction)
    y, ladj = apply(value, condition)
    again, back = other(y, condition)
    assert ladj.shape == batch and y.dtype == ladj.dtype == F64
    torch.testing.assert_close(again, value, rtol=0, atol=1e-10)
    torch.testing.assert_close(back, -ladj, rtol=0, atol=1e-10)
    if batch in ((), (2,)):
        one = value if batch == () else value[0]
        c = condition if batch == () or condition is None else condition[0]
        jacobian = torch.autograd.functional.jacobian(lambda v: apply(v, c)[0], one)
        expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
        torch.testing.assert_close(ladj.reshape(-1)[0], expected, rtol=0, atol=1e-10)
        assert name == "squeeze" or expected.abs() > 1e-2


def test_squeeze_turns_squares_of_pixels_into_channels():
    x = torch.arange(16.0).reshape(1, 4, 4)
    z, _ = Squeeze().inverse(x)
    assert z[:, 0, 0].tolist() == [0, 1, 4, 5] and z[:, 1, 1].tolist() == [10, 11, 14, 15]
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    z, _ = Squeeze().inverse(images)
    assert torch.equal(z, F.pixel_unshuffle(images, 2))


def test_linear_map_of_each_pixel_is_a_1x1_convolution(randomized, generator):
    inner = randomized(LU(3, rotated=True))
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=F64)
    z, ladj = PerPixel(inner).inverse(x)
    weight = inner.inverse(torch.eye(3, dtype=F64))[0].T - inner.bias[:, None]
    expected = F.conv2d(x, weight[:, :, None, None], inner.bias)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(ladj, 20 * torch.linalg.slogdet(weight).logabsdet.expand(2))


def test_incompatible_parts_are_refused():
    with pytest.raises(ValueError, match="expected 0 < keep < 4, got 4"):
        ConvCoupling(4, 4)
    with pytest.raises(ValueError, match="unconditional transform of vectors"):
        PerPixel(Coupling(2, context_dim=1))
    with pytest.raises(ValueError, match="by 4 for 2 levels, got 6 × 8; take levels=1"):
        cnf.models.build("glow", shape=(1, 6, 8), levels=2)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("glow", {"levels": 2, "layers": 1, "hidden": (4, 5)}),
        ("nsf", {"levels": 2, "layers": 1, "hidden": (4,), "bins": 3, "bound": 2.0}),
        ("realnvp", {"scales": 2, "layers": 2, "hidden": (4, 4)}),
    ],
)
def test_model_is_a_bijection_between_images_and_noise(
    name, options, context, randomized, generator
):
    flow = cnf.models.build(name, shape=(2, 4, 4), context=context, **options)
    flow = randomized(flow, gain=0.35).eval()
    x = torch.randn(3, 2, 4, 4, generator=generator, dtype=F64)
    c = torch.randn(3, context, generator=generator, dtype=F64) if context else None
    z = flow.encode(x, c)
    assert z.shape == x.shape
    torch.testing.assert_close(flow.decode(z, c), x, rtol=0, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: flow.encode(v[None], None if c is None else c[:1])[0], x[0]
    )
    log_det = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
    expected = flow.base.log_prob(z[0]) + log_det
    torch.testing.assert_close(flow.log_prob(x, c)[0], expected, rtol=0, atol=1e-8)
    assert log_det.abs() > 0.1
    reached = (jacobian.abs() > 1e-12).double().mean()
    assert reached > (0.5 if name == "realnvp" else 0.9)  # pixels that reach noise


@pytest.mark.parametrize("odd", [False, True])
def test_checkerboard_keeps_every_other_pixel_and_sees_no_others(odd, randomized, generator):
    coupling = randomized(CheckerboardCoupling(2, odd, hidden=(5, 6)))
    x = torch.randn(2, 3, 4, generator=generator, dtype=F64)
    kept = torch.tensor([[(i + j) % 2 == odd for j in range(4)] for i in range(3)])
    jacobian = torch.autograd.functional.jacobian(lambda v: coupling.inverse(v)[0], x)
    within = jacobian[:, kept][..., kept].reshape(12, 12)
    assert torch.equal(within, torch.eye(12, dtype=F64))
    assert not jacobian[:, kept][..., ~kept].any()
    others = jacobian[:, ~kept][..., ~kept].reshape(12, 12)
    assert torch.equal(others, others.diag().diag()) and (others.diag() != 1).all()
    assert (jacobian[:, ~kept][..., kept].reshape(12, 12).abs() > 1e-9).any(1).all()


@pytest.mark.parametrize(
    "kind",
    [
        lambda net: ConvCoupling(4, 2, conditioner=net),
        lambda net: CheckerboardCoupling(4, conditioner=net),
    ],
)
def test_conditioner_that_gives_other_channels_or_edits_its_input_is_refused(kind):
    x = torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match="conditioner Conv2d to give (4|8) numbers .*, got 2; it"):
        kind(lambda i, o: torch.nn.Conv2d(i, 2, 1))(x)  # 2 would broadcast over the channels
    net = kind(lambda i, o: torch.nn.Sequential(torch.nn.ReLU(True), torch.nn.Conv2d(i, o, 1)))
    with pytest.raises(ValueError, match="edits its input x in place"):
        net(x)


def test_conditioner_that_is_a_network_is_refused():
    with pytest.raises(TypeError, match="ConvCoupling: expected conditioner to be a function"):
        ConvCoupling(4, 2, conditioner=ResidualConvNet(2, 4))
    with pytest.raises(ValueError, match=r"blocks of one width, .*got \(8, 9\)"):
        ResidualConvNet(2, 4, (8, 9))
