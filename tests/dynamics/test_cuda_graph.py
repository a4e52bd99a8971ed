"""Capture of a fixed-step training solve as a CUDA graph."""

import pytest
import torch

from cnf import Batch, MaximumLikelihood, Solver
from cnf.models import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gradients(flow):
    return [p.grad.clone() for p in flow.field.parameters()]


def test_replayed_cuda_graph_gives_the_gradients_of_its_batch():
    solver = Solver("rk4", steps=4, gradient="backprop")
    flow = build("cnf", dim=2, hidden=(16, 16), solver=solver).cuda()
    x = torch.randn(64, 2, device="cuda")

    def step():
        flow.zero_grad(set_to_none=False)
        MaximumLikelihood()(flow, Batch(x)).value.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(torch.randn(64, 2, device="cuda"))
    graph.replay()
    replayed = gradients(flow)
    step()
    for ours, eager in zip(replayed, gradients(flow), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    assert max(grad.abs().max() for grad in replayed) > 1e-3
