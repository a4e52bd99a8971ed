"""A batch in parts: the numbers of the whole, in the memory of a part."""

import pytest
import torch

import cnf
from cnf import Batch, FlowMatching, MaximumLikelihood
from cnf.objectives import Joint


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", [FlowMatching(), MaximumLikelihood(), Joint()])
def test_parts_train_as_the_whole_does(objective, weighted, small, config, points):
    weight = torch.linspace(0.1, 5, 100).double() if weighted else None
    rows = Batch(points.double(), weight=weight)
    flows, losses = [], []
    for parts in (1, 3):
        flow = small().double()
        history = cnf.fit(flow, objective, rows, config(steps=20, lr=1e-3, accumulate=parts))
        flows.append(torch.cat([p.flatten() for p in flow.parameters()]))
        losses.append(history.column("loss"))
    # Adam makes as much of a small gradient's rounding as of a large gradient
    torch.testing.assert_close(*flows, rtol=1e-9, atol=1e-9)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # logged in float32
    start = torch.cat([p.flatten() for p in small().double().parameters()])
    assert (flows[0] - start).abs().max() > 1e-3


def test_the_loss_is_computed_of_one_part_at_a_time(small, config, points, monkeypatch):
    sizes, loss = [], FlowMatching.__call__
    monkeypatch.setattr(
        FlowMatching,
        "__call__",
        lambda self, m, rows: sizes.append(len(rows.t)) or loss(self, m, rows),
    )
    cnf.fit(small(), FlowMatching(), points, config(steps=2, accumulate=4, validations=0))
    assert sizes == [4] * 8


def test_a_bad_part_leaves_out_the_step(small, config, points):
    flow = small("realnvp", preprocess=None)
    before = [p.clone() for p in flow.parameters()]

    class Bad(MaximumLikelihood):
        def __call__(self, module, batch, generator=None):
            loss = super().__call__(module, batch, generator)
            return loss._replace(value=loss.value * (torch.nan if batch.x[0, 0] > 0 else 1.0))

    with pytest.raises(cnf.errors.DivergedError, match="NaN or infinite in 6 steps"):
        cnf.fit(flow, Bad(), points, config(accumulate=4, ema=None))
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


def test_a_batch_smaller_than_its_parts_is_refused(small, config, points):
    with pytest.raises(ValueError, match="process or part of accumulate, got one of 16"):
        cnf.fit(small(), FlowMatching(), points, config(accumulate=17))
