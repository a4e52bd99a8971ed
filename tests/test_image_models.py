"""RealNVP and neural spline flows of images: their parts, training, saving, labels, bits/dim."""

import math

import pytest
import torch

import cnf
from cnf import Batch, MaximumLikelihood
from cnf.data import Images
from cnf.metrics import bits_per_dim
from cnf.transforms import LU, ActNorm, CheckerboardCoupling, ConvCoupling, RationalQuadratic

F64 = torch.float64
SMALL = {
    "realnvp": {"layers": 2, "hidden": (4,), "scales": 2},
    "nsf": {"layers": 1, "hidden": (4,), "bins": 3, "levels": 2},
    "glow": {"layers": 1, "hidden": (4, 4), "levels": 2},
}
EACH = pytest.mark.parametrize("name", SMALL)


def built(name, **options):
    return cnf.models.build(name, **{"shape": (1, 8, 8), **SMALL[name], **options})


def parts(flow, kind):
    return [part for part in flow.modules() if isinstance(part, kind)]


@pytest.fixture
def pictures():
    """Squares of two shades, lit by their label, with pixels from 0 to 7."""
    seeded = torch.Generator().manual_seed(1)
    labels = torch.arange(80) % 2
    x = torch.randint(0, 3, (80, 1, 8, 8), generator=seeded)
    x[:, :, 2:6, 2:6] += 4 * labels[:, None, None, None]
    return Images(x.to(torch.uint8), "squares", labels, levels=8)


def test_realnvp_has_the_parts_of_the_paper_at_every_scale():
    flow = cnf.models.realnvp(shape=(1, 28, 28))
    boards, halves = parts(flow, CheckerboardCoupling), parts(flow, ConvCoupling)
    assert [board.dim for board in boards] == [4] * 4 + [2] * 3 + [1] * 3
    assert [board.odd for board in boards[:4]] == [False, True, False, True]
    assert [(half.dim, half.sizes) for half in halves] == [(8, [4, 4])] * 3 + [(4, [2, 2])] * 3
    assert len(parts(flow, ActNorm)) == 16
    assert flow.event_shape == (1, 28, 28)
    odd_sides = cnf.models.realnvp(shape=(3, 7, 5), hidden=(4,))  # one scale needs no squeeze
    assert odd_sides.sample(2).shape == (2, 3, 7, 5) and not parts(odd_sides, ConvCoupling)


def test_nsf_is_glow_with_splines_in_its_steps():
    flow = cnf.models.nsf(shape=(1, 28, 28), bins=5, bound=3.0)
    couplings = parts(flow, ConvCoupling)
    splines = [each.transformer for each in couplings if each.transformer.size > 2]
    assert len(couplings) == 13 and len(splines) == 12 == len(parts(flow, LU))
    curves = [spline.transformer.curve for spline in splines]
    assert all((curve.bins, curve.bound) == (5, 3.0) for curve in curves)
    assert all(isinstance(spline.transformer, RationalQuadratic) for spline in splines)


@EACH
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_reach_every_scale_and_the_context(name, mode, randomized, generator):
    flow = getattr(randomized(built(name, context=2), 0.5), mode)()
    x = torch.randn(3, 1, 8, 8, generator=generator, dtype=F64)
    context = torch.randn(3, 2, generator=generator, dtype=F64).requires_grad_()
    MaximumLikelihood()(flow, Batch(x, context)).value.backward()
    dead = [name for name, weight in flow.named_parameters() if not weight.grad.abs().max() > 0]
    assert not dead and context.grad.abs().min() > 0


@EACH
def test_half_of_the_numbers_is_factored_out_at_each_scale(name, randomized, generator):
    flow = randomized(built(name), 0.5)
    inner = flow.transform.transforms[1]  # the channels that go on to the next scale
    z = torch.randn(2, 1, 8, 8, generator=generator, dtype=F64)
    squeezed = torch.nn.functional.pixel_unshuffle(z, 2)
    went_on, _ = inner(squeezed)
    changed = (went_on != squeezed).double().mean((0, 2, 3))
    assert changed.tolist() == [1, 1, 0, 0]


@EACH
def test_saved_flow_is_built_again_with_its_density(name, tmp_path, generator):
    flow = built(name, context=2, dequantization="uniform", preprocess=["logit", "standardize"])
    for weight in flow.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    x, context = torch.randint(0, 256, (3, 1, 8, 8)), torch.eye(2)[[0, 1, 0]]
    flow.preprocess.fit(x + 0.5)
    again = cnf.load(cnf.save(flow.eval(), tmp_path / "flow.safetensors"))
    assert again.spec == flow.spec
    pair = [
        f.log_prob(x, context, generator=torch.Generator().manual_seed(0)) for f in (flow, again)
    ]
    assert torch.equal(*pair)


@EACH
def test_fit_learns_labels_and_goes_on_where_it_was_interrupted(name, pictures, tmp_path):
    data = pictures.conditional()
    settings = {
        "steps": 24, "batch_size": 24, "lr": 1e-2, "ema": 0.9, "validations": 1, "seed": 3,
        "progress": False, "device": "cpu", "checkpoint_seconds": 1e-9,
    }  # fmt: skip

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 9:
            raise Killed

    def train(*callbacks, **more):
        torch.manual_seed(5)
        flow = built(name, **data.sizes)
        cnf.fit(flow, "maximum-likelihood", data, {**settings, **more}, callbacks=callbacks)
        return flow

    whole = train()
    with pytest.raises(Killed):
        train(kill, folder=tmp_path / "run")
    resumed = train(folder=tmp_path / "run", resume=True)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    right, wrong = (
        bits_per_dim(whole, data.x, labels, draws=2, generator=torch.Generator().manual_seed(0))
        for labels in (data.context, data.context.flip(1))
    )
    assert right.value < 3  # log2 of the levels: what an untrained code takes
    assert right.value + 3 * wrong.error < wrong.value
    drawn = whole.sample(
        (40,), torch.tensor([0.0, 1.0]), generator=torch.Generator().manual_seed(0)
    )
    assert drawn.shape == (40, 1, 8, 8) and set(drawn.unique().tolist()) <= set(range(8))


@EACH
def test_bits_per_dim_is_the_bound_in_bits(name, pictures, randomized):
    flow = randomized(built(name, dequantization={"name": "uniform", "levels": 8}), 0.3)
    x = pictures.x[:3]
    told = bits_per_dim(flow, x, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(0)
    u = torch.rand(3, 1, 8, 8, generator=noise, dtype=F64)
    flow.dequantization = None
    expected = -flow.log_prob(x + u) / (64 * math.log(2))
    assert told.value == pytest.approx(expected.mean().item(), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("realnvp", {"shape": (1, 30, 30)}, "divisible by 4 for 3 scales.*take scales=2"),
        ("realnvp", {"shape": (8, 8)}, r"expected a shape \(C, H, W\), got \(8, 8\)"),
        ("realnvp", {"shape": (1, 8, 8), "layers": 0}, "expected layers > 0, got 0"),
        ("realnvp", {"shape": (1, 8, 8), "hidden": (4, 5)}, "blocks of one width"),
        ("realnvp", {"shape": (1, 8, 8), "between": "lu"}, "images have no map between layers"),
        ("realnvp", {"dim": 2, "scales": 2}, "scales are those of an image"),
        ("nsf", {"shape": (1, 6, 8)}, "by 4 for 2 levels, got 6 × 8; take levels=1, or pad"),
        ("nsf", {"shape": (1, 7, 8), "levels": 1}, "by 2 for 1 levels, got 7 × 8; pad or crop"),
        ("nsf", {"shape": (8, 8)}, r"nsf: expected a shape \(C, H, W\), got \(8, 8\)"),
        ("nsf", {"shape": (1, 8, 8), "levels": 0}, "nsf: expected levels > 0, got 0"),
        ("glow", {"shape": (1, 8, 8), "layers": 0}, "glow: expected layers > 0, got 0"),
        ("nsf", {"shape": (1, 8, 8), "between": None}, "expected between='lu' and no period"),
        ("nsf", {"shape": (1, 8, 8), "period": 1.0}, "expected between='lu' and no period"),
        ("nsf", {"dim": 2, "levels": 2}, "levels are those of an image"),
        ("nsf", {}, "nsf: expected dim=… or shape="),
    ],
)
def test_options_that_do_not_fit_images_are_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as told:
        cnf.models.build(name, **options)
    assert "\n" not in str(told.value)
