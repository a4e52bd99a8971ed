"""Training on a CUDA device."""

import pytest
import torch

import cnf
from cnf.registry import options_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge:UserWarning")
@pytest.mark.parametrize("coupling", cnf.matching.COUPLINGS)
def test_flow_matching_trains_on_cuda(coupling, config, small, points):
    flow = small()
    history = cnf.fit(flow, cnf.FlowMatching(coupling=coupling), points, config(device="cuda"))
    assert (history.steps, history.skipped) == (6, 0)
    assert torch.isfinite(flow.log_prob(points.cuda())).all()


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
def test_likelihood_with_the_adjoint_trains_on_cuda(name, divergence, config, small):
    solved = "solver" in options_of(cnf.models.MODELS[name])
    options = {"solver": cnf.Solver(gradient="adjoint")} if solved else {}
    flow, toy = small(name, **options), cnf.data.toy("moons")
    if not options and divergence != "exact":
        pytest.skip("no ODE, no divergence")
    objective = cnf.MaximumLikelihood(divergence=divergence)
    history = cnf.fit(flow, objective, toy, config(device="cuda"))
    assert (history.steps, history.skipped) == (6, 0)
    assert all(p.device.type == "cuda" and p.dtype == torch.float32 for p in flow.parameters())
    assert torch.isfinite(flow.log_prob(toy.sample(100).cuda())).all()


def test_checkpoint_of_cuda_run_loads_on_cpu(config, small, points, tmp_path):
    flow = small()
    cnf.fit(flow, cnf.FlowMatching(), points, config(device="cuda", folder=tmp_path / "run"))
    read = cnf.load(tmp_path / "run")
    assert all(p.device.type == "cpu" for p in read.parameters())
    expected = flow.log_prob(points.cuda()).cpu()
    torch.testing.assert_close(read.log_prob(points), expected, rtol=1e-4, atol=1e-4)
