"""Export of flows by torch.export and ONNX, for any number of rows."""

import inspect
import io

import pytest
import torch
from torch import nn

from cnf.dynamics import Solver
from cnf.models import MODELS

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROWS = (1, 2, 63, 64, 200)


class Call(nn.Module):
    """One method of a flow as a module's forward, which is what can be exported."""

    def __init__(self, flow, method):
        super().__init__()
        self.flow, self.method = flow, method

    def forward(self, value, context=None):
        return getattr(self.flow, self.method)(value, context)


@pytest.fixture
def exported(small_flow, randomized):
    """(name, method, context) → the module, the exported program, and inputs by their rows."""

    def export(name, method, context=0, float32=False):
        if name == "glow":
            flow = randomized(MODELS[name](shape=(1, 4, 4), context=context, hidden=(4, 4)))
        else:
            solver = Solver("rk4", steps=1)
            one = {"layers": 1} if "layers" in inspect.signature(MODELS[name]).parameters else {}
            flow = small_flow(name, context=context, solver=solver, gain=0.5, **one)
        flow = (flow.float() if float32 else flow).eval()
        dtype = torch.float32 if float32 else torch.float64
        shapes = [flow.event_shape, *([(context,)] if context else [])]

        def inputs(rows):
            return tuple(torch.randn(rows, *shape, dtype=dtype) for shape in shapes)

        module, batch = Call(flow, method), torch.export.Dim("batch")
        dynamic = tuple({0: batch} for _ in shapes)
        return module, torch.export.export(module, inputs(5), dynamic_shapes=dynamic), inputs

    return export


QUICK = ("cnf", "planar")


@pytest.mark.parametrize("method", ["log_prob", "decode"])
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS.taking("dim")],
)
def test_exported_flow_accepts_any_number_of_rows(name, method, exported):
    module, program, inputs = exported(name, method, context=2)
    for rows in ROWS:
        given = inputs(rows)
        torch.testing.assert_close(program.module()(*given), module(*given))


@pytest.mark.parametrize("method", ["log_prob", "decode"])
@pytest.mark.parametrize("context", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_onnx_export_agrees_with_rk4(context, method, exported):
    module, program, inputs = exported("cnf", method, context, float32=True)
    buffer = io.BytesIO()
    torch.onnx.export(program, inputs(5), dynamo=True, verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    for rows in ROWS:
        given = inputs(rows)
        feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        (found,) = session.run(None, feed)
        # float32's rounding, in another order of operations
        torch.testing.assert_close(
            torch.from_numpy(found), module(*given).detach(), rtol=1e-4, atol=1e-4
        )
