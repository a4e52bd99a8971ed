"""Flow matching: a regression of the velocity, no ODE solved."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cnf.errors import expect_event
from cnf.flow import Flow
from cnf.matching.couplings import COUPLINGS
from cnf.matching.paths import PATHS, Path
from cnf.matching.times import TIMES
from cnf.objectives.base import (
    OBJECTIVES,
    Batch,
    Loss,
    Objective,
    as_flow,
    require_continuous,
    weighted_mean,
)


@OBJECTIVES.register("flow-matching")
@dataclass(frozen=True)
class FlowMatching(Objective):
    """E‖v(t, xt) - ut‖² over times t and coupled pairs (x0, x1); no ODE is solved.

    Source: Lipman et al. (2023), https://arxiv.org/abs/2210.02747; Tong et al. (2024),
    https://arxiv.org/abs/2302.00482.

    Args:
        path: A name in `PATHS`, a `Path`, or {"name": …, **fields}.
        coupling: A name in `COUPLINGS`, or a coupling function.
        times: The law of t: a name in `TIMES`, {"name": …, **fields}, or a function of uniform u.
    """

    needs_data = True
    lr = 6e-3

    path: Any = "linear"
    coupling: Any = "independent"
    times: Any = "uniform"

    def __post_init__(self) -> None:
        _ = self._times()
        path = self._path()
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", path)
        if isinstance(self.coupling, str):
            _ = COUPLINGS[self.coupling]

    def _path(self) -> Path:
        if isinstance(self.path, Path):
            return self.path
        settings = {"name": self.path} if isinstance(self.path, str) else dict(self.path)
        return PATHS[settings.pop("name")](**settings)

    def _times(self) -> Any:
        if callable(self.times):
            return self.times
        settings = {"name": self.times} if isinstance(self.times, str) else dict(self.times)
        return TIMES[settings.pop("name")](**settings)

    def prepare(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Batch:
        flow = as_flow("FlowMatching", module)
        require_continuous("FlowMatching", flow)
        expect_event("FlowMatching", "x", batch.x, flow.event_shape)
        x1 = batch.x
        with torch.no_grad():
            if flow.dequantisation is not None:
                x1 = flow.dequantisation.encode(x1, generator)[0]
            if flow.preprocess is not None:
                x1 = flow.preprocess.inverse(x1)[0]
            batch = replace(batch, x1=x1)
            if batch.x0 is None:
                batch = self._paired(flow, batch, x1, generator)
            if batch.t is None:
                device = x1.device if generator is None else generator.device
                u = torch.rand(len(batch.x), generator=generator, device=device, dtype=x1.dtype)
                batch.t = self._times()(u).to(x1.device)
        return batch

    def _paired(
        self, flow: Flow, batch: Batch, x1: Tensor, generator: torch.Generator | None
    ) -> Batch:
        x0 = flow.base.sample((len(x1),), generator)
        couple = COUPLINGS[self.coupling] if isinstance(self.coupling, str) else self.coupling
        i, j, weight = couple(x0, x1, batch.context, generator)
        if j is not None:
            batch = batch.map(lambda rows: rows[j])  # what belongs to a data point follows it
        batch.x0 = x0 if i is None else x0[i]
        batch.weight = _product(batch.weight, weight)
        return batch

    def __call__(
        self, module: nn.Module, batch: Batch, generator: torch.Generator | None = None
    ) -> Loss:
        flow = as_flow("FlowMatching", module)
        if batch.x0 is None or batch.x1 is None or batch.t is None:
            batch = self.prepare(flow, batch, generator)
        assert batch.x0 is not None and batch.x1 is not None and batch.t is not None
        t, xt, ut = self._path().sample(batch.x0, batch.x1, batch.t)
        context = flow.checked_context("FlowMatching", batch.context, xt.shape[:1])
        error = (flow.field(t, xt, context) - ut).square()
        if batch.weight is None:
            value = error.sum() / len(error)
        else:
            value = weighted_mean(error.flatten(1).sum(1), batch.weight)
        return Loss(value, {"fm": value.detach()})

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """The field's; the base stays as it is."""
        flow = as_flow("FlowMatching", module)
        require_continuous("FlowMatching", flow)
        return flow.field.parameters()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
