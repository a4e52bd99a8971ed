"""Fields that wrap other fields."""

import pytest
import torch

from cnf.fields import (
    ConvField,
    EndTime,
    MLPField,
    NullContext,
    Piecewise,
    Preconditioned,
    ResidualField,
    VectorField,
    exact_divergence,
)
from cnf.fields.wrappers import Piece

F64 = torch.float64


class Line(VectorField):
    """v = rate · t · x + offset (+ c), without a closed-form divergence."""

    def __init__(self, rate, offset=0.0, context_dim=0):
        super().__init__((2,), context_dim)
        self.rate = torch.nn.Parameter(torch.tensor(rate, dtype=F64))
        self.offset = offset

    def forward(self, t, x, context=None):
        assert t.dim() == 0 or t.shape == x.shape[:-1]
        v = self.rate * t.unsqueeze(-1) * x + self.offset
        return v if context is None else v + context


def constants(count):
    return Piecewise([Line(0.0, float(k + 1)) for k in range(count)])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10])
@pytest.mark.parametrize("batch", ["shared", "rows", "grid"])
def test_piecewise_field_selects_its_block_by_time(count, batch):
    field = constants(count)
    knots = torch.arange(count, dtype=F64) / count
    t = torch.cat([knots, knots + 0.5 / count, torch.tensor([1.0, -0.1, 1.1], dtype=F64)])
    block = [*range(count), *range(count), count - 1, 0, count - 1]
    expected = count * (torch.tensor(block, dtype=F64) + 1)  # run K times as fast
    if batch == "shared":
        v = torch.stack([field(time, torch.zeros(3, 2, dtype=F64))[0] for time in t])
    elif batch == "rows":
        v = field(t, torch.zeros(len(t), 2, dtype=F64))
    else:
        v = field(t.expand(3, -1), torch.zeros(3, len(t), 2, dtype=F64))[1]
    torch.testing.assert_close(v, expected.unsqueeze(-1).expand(-1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_piece_maps_its_interval_to_unit_time(count):
    block = Line(5.0)
    x = torch.tensor([1.0, -2.0], dtype=F64)
    for k in range(count):
        piece = Piece(block, k, count)
        for local in (0.0, 0.25, 1.0):
            t = torch.tensor((k + local) / count, dtype=F64)
            v, div = piece.with_divergence(t, x)
            torch.testing.assert_close(v, count * 5 * local * x)
            torch.testing.assert_close(div, torch.tensor(count * 5 * local * 2, dtype=F64))
            torch.testing.assert_close(piece(t, x), v)


def test_piecewise_field_equals_its_pieces(randomized, points):
    field = randomized(Piecewise([MLPField(2, (5,), 2), ResidualField(2, (4,), 2)]))
    t, x, context = points(field, (6,), own_time=True)
    v, div = exact_divergence(field, t, x, context)
    assert field.knots == (0.0, 0.5, 1.0)
    for k in range(6):
        piece = field.block(int(t[k] >= 0.5))
        alone = piece.with_divergence(t[k], x[k], context[k])
        torch.testing.assert_close(alone, (v[k], div[k]), rtol=1e-11, atol=1e-11)


def test_plain_field_is_its_only_block():
    field = MLPField(2)
    assert field.knots == (0.0, 1.0) and field.block(0) is field
    timed = EndTime(Piecewise([field, field]))  # its knots move with the end time
    assert timed.knots == (0.0, 1.0) and timed.block(0) is timed


def test_block_of_a_wrapper_is_cached_and_shares_its_weights():
    field = MLPField(2, (5,), 3)
    field = NullContext(Preconditioned(Piecewise([field, MLPField(2, (5,), 3)])))
    block = field.block(1)
    assert block is field.block(1) and block is not field.block(0)
    field.null = torch.nn.Parameter(torch.ones(3))
    assert field.block(1) is block and block.null is field.null
    assert set(block.parameters()) < set(field.parameters())
    field.field.field.pieces[1] = Piece(MLPField(2, (4,), 3), 1, 2)
    assert field.block(1) is not block
    assert field.block(1).field.field is field.field.field.pieces[1]


def test_one_field_as_two_blocks_has_twice_the_velocity_and_the_same_weights(points):
    block = Line(0.0, 3.0)
    field = Piecewise([block, block])
    t, x, _ = points(field, own_time=True)
    assert (field(t, x) == 6.0).all()
    assert len(list(field.parameters())) == 1


@pytest.mark.parametrize("shape", [(2,), (4, 2)])
def test_context_follows_its_row(shape):
    field = Piecewise([Line(0.0, 0.0, 2), Line(0.0, 10.0, 2)])
    context = torch.arange(8, dtype=F64).reshape(4, 2)
    context = context[1] if shape == (2,) else context
    t = torch.tensor([0.9, 0.1, 0.6, 0.4], dtype=F64)
    v = field(t, torch.zeros(4, 2, dtype=F64), context)
    offset = torch.tensor([10.0, 0.0, 10.0, 0.0], dtype=F64).unsqueeze(-1)
    assert torch.equal(v, 2 * (offset + context))


def test_gradients_reach_only_the_blocks_that_are_evaluated():
    field = Piecewise([Line(1.0), Line(2.0), Line(3.0)])
    t = torch.tensor([0.2, 0.9], dtype=F64, requires_grad=True)
    x = torch.ones(2, 2, dtype=F64, requires_grad=True)
    field(t, x).sum().backward()
    first, middle, last = (piece.field.rate.grad for piece in field.pieces)
    assert first.item() == pytest.approx(3 * 0.6 * 2) and last.item() == pytest.approx(3 * 0.7 * 2)
    assert middle is None
    # v = K · rate · (K t - k) · x
    torch.testing.assert_close(t.grad, 9 * 2 * torch.tensor([1.0, 3.0], dtype=F64))
    expected = torch.tensor([[3 * 0.6], [3 * 3 * 0.7]], dtype=F64).expand(2, 2)
    torch.testing.assert_close(x.grad, expected)


def test_blocks_of_different_shapes_are_refused():
    for blocks in ([MLPField(2), MLPField(3)], [MLPField(2), MLPField(2, context_dim=1)], []):
        with pytest.raises(ValueError, match="blocks of one event shape and context size"):
            Piecewise(blocks)


@pytest.mark.parametrize("end", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("own_time", [False, True])
def test_end_time_scales_time_and_velocity(end, own_time, points):
    field = EndTime(Line(2.0), end).double()
    t, x, _ = points(field, (2, 3), own_time)
    v, div = field.with_divergence(t, x)
    rate = (end * 2 * end * t).expand(2, 3)
    torch.testing.assert_close(v, rate.unsqueeze(-1) * x, rtol=1e-6, atol=1e-6)  # log in float32
    torch.testing.assert_close(div, 2 * rate, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(field(t, x), v)
    assert div.abs().min() > 1e-2


def euler(field, x, steps=16):
    """x and the log-determinant after `steps` from 0 to 1."""
    ladj = x.new_zeros(x.shape[:-1])
    for k in range(steps):
        t = torch.tensor((k + 0.5) / steps, dtype=x.dtype)
        v, div = field.with_divergence(t, x)
        x, ladj = x + v / steps, ladj + div / steps
    return x, ladj


def test_gradient_of_the_end_time_equals_finite_differences(randomized, points):
    field = randomized(EndTime(MLPField(2, (6, 5)), 2.0))
    _, x, _ = points(field)

    def loss():
        value, ladj = euler(field, x)
        return (value.square().sum() / 2 - ladj.sum()).double()

    (gradient,) = torch.autograd.grad(loss(), field.log_end)
    start, step, losses = field.log_end.detach().clone(), 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            field.log_end.copy_(start + sign * step)
            losses.append(loss())
    numerical = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(gradient, numerical, rtol=1e-7, atol=1e-8)
    assert numerical.abs() > 1e-2


@pytest.mark.parametrize("initial", [0.0, -1.0])
def test_end_time_that_is_not_positive_is_refused(initial):
    with pytest.raises(ValueError, match=f"EndTime: expected initial > 0, got {initial}"):
        EndTime(MLPField(2), initial)
    field = EndTime(MLPField(2), 2.5)
    assert field.log_end.exp().item() == pytest.approx(2.5)
    assert field.event_shape == (2,) and field.context_dim == 0


@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_preconditioning_has_closed_form(own_time, batch, points):
    field = Preconditioned(Line(2.0))
    t, x, _ = points(field, batch, own_time)
    spread = (t**2 + (1 - t) ** 2).sqrt()
    rate = ((2 * t - 1) / spread**2 + 2 * t / spread).expand(batch)
    v, div = field.with_divergence(t, x)
    torch.testing.assert_close(v, rate.unsqueeze(-1) * x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(div, 2 * rate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(field(t, x), v, rtol=1e-12, atol=1e-12)
    assert div.abs().min() > 1e-2


@pytest.mark.parametrize(("kind", "event"), [(MLPField, 3), (ConvField, (1, 2, 3))])
def test_preconditioned_zero_field_follows_the_standard_deviation_of_the_path(kind, event, points):
    # x_t = s(t) z has velocity s' z, and s is the spread of (1 - t) x0 + t x1
    field = Preconditioned(kind(event, (4,), zero_last=True)).double()
    _, z, _ = points(field)
    for time in (0.0, 0.2, 0.5, 0.9, 1.0):
        t = torch.tensor(time, dtype=F64)

        def path(t):
            return torch.hypot(t, 1 - t) * z

        x, velocity = torch.func.jvp(path, (t,), (torch.ones_like(t),))
        v, div = exact_divergence(field, t, x)
        torch.testing.assert_close(v, velocity, rtol=1e-12, atol=1e-12)
        size = z[0].numel()
        rate = size * (2 * time - 1) / (time**2 + (1 - time) ** 2)
        torch.testing.assert_close(div, torch.full((4,), rate, dtype=F64))
