"""The U-Net: what reaches its blocks, its divergence, and training it on tiny pictures."""

import json

import pytest
import torch

import cnf
from cnf import Batch, FlowMatching, MaximumLikelihood, Solver
from cnf.dynamics.divergence import seconds_of_exact, traced_field
from cnf.fields import FIELDS, UNetField, exact_divergence, trace
from cnf.fields.unet import _Attention, _Block
from cnf.sampling import guided

F64 = torch.float64
STEPS = Solver("rk4", steps=2)


def build(shape=(1, 4, 4), width=4, context=0, scales=(1, 2), blocks=1, **options):
    return UNetField(shape, width, context, scales, blocks, zero_last=False, **options).double()


def blocks_of(field):
    return [part for part in field.modules() if isinstance(part, _Block)]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize(
    ("shape", "scales"), [((2, 4, 6), (1, 2)), ((1, 5, 3), (1,)), ((3, 8, 4), (1, 1, 2))]
)
def test_row_is_independent_of_the_batch_for_all_shapes(shape, scales, batch, context, points):
    field = build(shape, 4, context, scales)
    t, x, c = points(field, batch, own_time=True)
    v = field(t, x, c)
    assert v.shape == x.shape == (*batch, *shape) and v.dtype == F64
    contexts = None if c is None else c.reshape(-1, 2)
    rows = zip(t.flatten(), x.reshape(-1, *shape), v.reshape(-1, *shape), strict=True)
    for k, (time, row, own) in enumerate(rows):
        alone = field(time, row, None if contexts is None else contexts[k])
        torch.testing.assert_close(alone, own, rtol=1e-11, atol=1e-11)


def test_time_and_context_reach_every_block_by_its_film(points):
    field = build(context=2, blocks=2)
    t, x, c = points(field)
    assert len(blocks_of(field)) == 2 * 2 + 2 + 2 * 3  # down, middle, up
    v = field(t, x, c)
    for block in blocks_of(field):
        others = [other for other in blocks_of(field) if other is not block]
        weights = [other.film.weight.data.clone() for other in others]
        own = block.film.weight.data.clone()
        block.film.weight.data.zero_()
        assert (field(t, x, c) - v).abs().amax((1, 2, 3)).min() > 1e-8  # rounding is 1e-15
        block.film.weight.data.copy_(own)
        for other in others:
            other.film.weight.data.zero_()
        alone = field(t, x, c)
        for changed in (field(t + 0.3, x, c), field(t, x, -c)):
            assert (changed - alone).abs().amax((1, 2, 3)).min() > 1e-8
        for other, weight in zip(others, weights, strict=True):
            other.film.weight.data.copy_(weight)


def test_film_scales_and_shifts_the_normalized_features(generator):
    block = blocks_of(build())[0]
    x = torch.randn(2, 4, 4, 4, generator=generator, dtype=F64)
    u = torch.randn(2, block.film.in_features, generator=generator, dtype=F64)
    silu, group = torch.nn.functional.silu, torch.nn.functional.group_norm
    h = block.convolution(silu(group(x, 1, block.norm.weight, block.norm.bias)))
    scale, shift = (u @ block.film.weight.T + block.film.bias).reshape(2, 2, 4, 1, 1).unbind(1)
    h = group(h, 1, block.film_norm.weight, block.film_norm.bias) * (1 + scale) + shift
    expected = block.attention(x + block.residual(silu(h)))
    torch.testing.assert_close(block(x, u), expected, rtol=1e-12, atol=1e-12)


def test_attention_equals_its_formula_for_each_head(randomized, generator):
    attention = randomized(_Attention(64))
    x = torch.randn(2, 64, 3, 2, generator=generator, dtype=F64)
    q, k, v = attention.queries_keys_values(attention.norm(x)).flatten(2).chunk(3, 1)
    heads = []
    for part in (slice(0, 32), slice(32, 64)):
        weights = torch.softmax(q[:, part].mT @ k[:, part] / 32**0.5, -1)  # (N, HW, HW)
        heads.append(v[:, part] @ weights.mT)
    expected = x + attention.out(torch.cat(heads, 1).reshape(x.shape))
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("largest", "count"), [(0, 0), (7, 2 + 3 + 2), (14, 17 - 5), (28, 17)])
def test_attention_is_at_the_resolutions_up_to_the_given_one(largest, count):
    field = UNetField((1, 28, 28), 4, scales=(1, 1, 1), attention=largest)
    assert sum(isinstance(part, _Attention) for part in field.modules()) == count


def test_default_starts_as_the_identity_and_learns(generator):
    field = UNetField((1, 4, 4), 4, scales=(1, 2), blocks=1)
    x = torch.randn(3, 1, 4, 4, generator=generator)
    assert not field(torch.tensor(0.5), x).any()
    (field(torch.tensor(0.5), x) - 1).square().sum().backward()
    assert field.last.weight.grad.abs().max() > 0


@pytest.mark.parametrize("train", [True, False])
def test_gradients_reach_every_weight(train, points):
    field = build(context=2, scales=(1, 2, 3), shape=(1, 8, 8)).train(train)
    t, x, c = points(field, own_time=True)
    field(t, x, c).square().sum().backward()
    assert all(weight.grad.abs().max() > 1e-6 for weight in field.parameters())


def test_divergence_is_the_trace_of_the_jacobian(randomized, points, autograd_divergence):
    field = randomized(FIELDS.examples["unet"](2))
    given = points(field, (2,), own_time=True)
    with torch.no_grad():
        v, div = exact_divergence(field, *given)
    torch.testing.assert_close(v, field(*given), rtol=1e-11, atol=1e-11)
    expected = autograd_divergence(field, *given)
    torch.testing.assert_close(div, expected, rtol=1e-9, atol=1e-10)
    assert expected.abs().min() > 1e-3


@pytest.mark.parametrize(
    ("context", "own_time", "groups"), [(2, True, (1, 3)), (0, False, (2, 1))]
)
def test_divergence_in_groups_and_its_gradients_equal_autograds(
    context, own_time, groups, randomized, points, autograd_divergence, monkeypatch
):
    field = randomized(build((1, 2, 2), context=context, scales=(1,), frequencies=1))
    given = points(field, (1, 3), own_time)
    monkeypatch.setattr("cnf.fields.base.groups_of", lambda *_: groups)
    leaves = [tensor.requires_grad_() for tensor in given if tensor is not None]
    leaves += field.parameters()
    weight = torch.tensor([[1.0, -2.0, 3.0]], dtype=F64)

    def gradients(div):
        return torch.autograd.grad((weight * div).sum(), leaves, materialize_grads=True)

    expected = autograd_divergence(field, *given)
    v, div = exact_divergence(field, *given)
    torch.testing.assert_close(v, field(*given), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(div, expected, rtol=1e-9, atol=1e-10)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(gradients(div), gradients(expected), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(exact_divergence(field, *given)[1], expected)


def test_estimate_has_gradients_where_attention_has_a_fused_kernel(generator):
    flow = cnf.models.unet((1, 16, 16), width=32, scales=(1,), blocks=1, solver=STEPS)
    torch.nn.init.normal_(flow.field.field.last.weight, std=0.1)
    x = torch.randn(2, 1, 16, 16, generator=generator)
    loss = MaximumLikelihood(solver=Solver("euler", steps=1))(flow, Batch(x)).value
    loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in flow.field.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_field_equals_eager_one_in_one_graph(points):
    torch.compiler.reset()
    field = build((1, 2, 2), context=2, scales=(1,))
    given = points(field)
    compiled = torch.compile(field, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), field(*given), rtol=1e-11, atol=1e-11)
    torch.compiler.reset()


def stripes(n, generator):
    """Horizontal (0, 1) and vertical (1, 0) stripes of 4 × 4 pixels, with noise."""
    label = torch.randint(2, (n,), generator=generator)
    line = torch.tensor([1.0, 1.0, -1.0, -1.0])
    image = torch.stack([line[:, None].expand(4, 4), line.expand(4, 4)])[label].unsqueeze(1)
    noise = 0.1 * torch.randn(n, 1, 4, 4, generator=generator)
    return image + noise, torch.nn.functional.one_hot(label, 2).float()


def tiny(**options):
    small = {"width": 8, "scales": (1, 2), "blocks": 1, "frequencies": 2, "solver": STEPS}
    return cnf.models.unet((1, 4, 4), **{**small, **options})


def test_flow_matching_learns_classes_which_guidance_amplifies(generator):
    images, labels = stripes(32, generator)
    flow = tiny(context=2, null_context=True, context_preprocess=None)
    objective = FlowMatching(context_dropout=0.2)
    adam = torch.optim.Adam(objective.parameters(flow), lr=6e-3)
    losses = []
    for _ in range(45):
        loss = objective(flow, Batch(images, labels), generator).value
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    flow.eval()
    line = torch.tensor([1.0, 1.0, -1.0, -1.0])
    eye = torch.eye(2).repeat_interleave(8, 0)
    seen = []
    for model in (flow, guided(flow, 3.0)):
        sample = model.sample((), eye, generator=torch.Generator().manual_seed(3))[:, 0]
        rows, columns = (sample.mean(k) @ line / 4 for k in (2, 1))  # 1 for own stripes, else 0
        seen.append((rows - columns)[:8].mean() - (rows - columns)[8:].mean())
        assert (rows > columns)[:8].float().mean() > 0.9
        assert (rows < columns)[8:].float().mean() > 0.9
    assert seen[1] > seen[0] > 1
    assert flow.sample(3).shape == (3, 1, 4, 4)  # without a context


def test_checkpoint_and_spec_give_the_same_flow(tmp_path, generator):
    flow = tiny(context=2, solver=Solver("euler", steps=1)).eval()
    torch.nn.init.normal_(flow.field.field.last.weight)
    x, c = torch.randn(2, 1, 4, 4, generator=generator), torch.eye(2)
    cnf.save(flow, tmp_path)
    again = cnf.load(tmp_path)
    assert torch.equal(again.log_prob(x, c), flow.log_prob(x, c))
    spec = json.loads(json.dumps(flow.spec))
    assert spec["model"] == "unet" and again.spec == spec
    twin = cnf.models.build("unet", **spec["options"])
    twin.load_state_dict(flow.state_dict())
    assert torch.equal(twin.field(torch.tensor(0.5), x, c), flow.field(torch.tensor(0.5), x, c))


def test_log_prob_tells_before_a_long_exact_trace_what_it_takes(monkeypatch, generator):
    x = torch.randn(3, 1, 8, 8, generator=generator)
    flow = cnf.models.unet((1, 8, 8), width=4, scales=(1,), blocks=1, solver=STEPS).eval()
    order = []
    monkeypatch.setattr(
        "cnf.flow.seconds_of_exact", lambda field, rows: order.append(rows) or 60.0
    )

    def inverse(self, x, context=None):
        order.append("solve")
        return x, x.sum((1, 2, 3))

    monkeypatch.setattr(cnf.transforms.Continuous, "inverse", inverse)
    message = (
        r"UNetField takes 64 tangents of each of 3 rows, 60 s for an evaluation: 8 minutes for 8 "
        r"evaluations by rk4.*divergence=Hutchinson\(probes=8\)"
    )
    with pytest.warns(UserWarning, match=message):
        flow.log_prob(x)
    flow.log_prob(x)  # once
    assert order == [3, "solve", "solve"]
    adaptive = cnf.models.unet((1, 8, 8), width=4, scales=(1,), blocks=1).eval()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="at least 20 minutes for its evaluations"),
    ):
        adaptive.log_prob(x)
    closed = cnf.models.cnf(64, hidden=(8,))
    assert traced_field(closed.field) is None
    adaptive.with_solver(STEPS).log_prob(x, divergence="hutchinson")


def test_seconds_of_a_trace_are_those_of_all_its_groups(monkeypatch):
    field = build((1, 8, 8), 4, scales=(1,))
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(trace, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(trace, "groups_of", lambda *_: (2, 10))  # of 5 rows, 64 tangents
    assert seconds_of_exact(field, rows=5) == pytest.approx(3 * 6.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8, 8)}, r"expected a shape \(C, H, W\), got \(8, 8\)"),
        ({"shape": (1, 28, 30), "scales": (1, 1, 1)}, "divisible by 4 .* got 28 × 30; pad"),
        ({"width": 6}, "expected width to be a multiple of 4, got 6"),
        ({"width": 0}, "expected width > 0, got 0"),
        ({"blocks": 0}, "expected blocks > 0, got 0"),
        (
            {"shape": (1, 14, 14), "scales": (1, 2, 2)},
            r"take fewer scales, such as scales=\(1, 2\)",
        ),
        ({"scales": ()}, "at least one scale"),
        ({"scales": 2}, r"as multiples of width, such as \(1, 2\) for two scales, got 2"),
        ({"scales": (1, 0)}, r"expected scales\[1\] > 0, got 0"),
        ({"frequencies": -1}, "frequencies >= 0"),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNetField(**{"shape": (1, 8, 8), "width": 4, **arguments})


def test_model_requires_a_shape_and_lists_its_options():
    with pytest.raises(ValueError, match=r"unet: expected shape=\(C, H, W\)"):
        cnf.models.build("unet")
    with pytest.raises(ValueError, match="unknown option 'dim'; known: shape"):
        cnf.models.build("unet", dim=2)


def test_memory_estimate_of_a_trace_is_the_largest_tensor_of_a_tangent():
    field = build((1, 8, 8), 4, scales=(1,))  # attention among 64 pixels: 64² weights
    x = torch.zeros(100, 1, 8, 8, dtype=F64)

    def v(y):
        return field(torch.tensor(0.5, dtype=F64), y)

    assert trace.tangent_size(field, v, x[:1], 3) == 64**2
    assert trace.groups_of(v, x[:20], 3, field) == (20, 64)  # a graph has a limit of its own
    with torch.no_grad():
        for n, groups in ((1, (1, 64)), (20, (20, 51)), (100, (64, 16))):
            rows, together = trace.groups_of(v, x[:n], 3, field)
            assert (rows, together) == groups
            assert rows * together * 64**2 * 8 * trace.COPIES <= trace.BYTES
