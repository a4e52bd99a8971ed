"""Training steps on a GPU as one CUDA graph: replayed at once, not launched kernel by kernel.

A small model's step is hundreds or thousands of kernels of a few microseconds each, which Python
cannot launch as fast as the device runs them. In a captured step the host reads nothing, so that
it never waits: the device itself leaves a bad step out, and counts it.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cnf.dynamics import ode
from cnf.errors import warn
from cnf.flow import Flow
from cnf.objectives import Loss, Objective
from cnf.objectives.batch import Prepared
from cnf.training.config import TrainConfig
from cnf.training.learner import BAD_STEPS, Learner
from cnf.transforms.continuous import solvers_in

WARM_UP = 3  # steps before the capture: libraries set themselves up, gradients get their memory
AHEAD = 2  # steps that the host may have handed over and not seen done
LOOK = 50  # steps between two looks at how many were bad


def learner_for(
    module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
) -> Learner:
    """The learner that the settings ask for: with a captured step on one CUDA device.

    Args:
        module: The module to train.
        objective: What is minimized.
        config: Its `compile` is read.
        fabric: The processes.

    Raises:
        ValueError: `compile=True` where there is no CUDA device, or several processes, or a solver
            whose steps cannot be captured.
    """
    hindrance = _hindrance(module, objective, fabric)
    if config.compile is True and hindrance:
        raise ValueError(
            f"fit: compile=True captures a step on one CUDA device, got {hindrance}; leave "
            "compile='auto'"
        )
    kind = Learner if hindrance or not config.compile else CapturedLearner
    return kind(module, objective, config, fabric)


def _hindrance(module: nn.Module, objective: Objective, fabric: Fabric) -> str | None:
    """What a step cannot be captured for, in words; None where it may be."""
    if fabric.device.type != "cuda":
        return f"the device {fabric.device}"
    if fabric.world_size > 1:
        return f"{fabric.world_size} processes"
    if not objective.capturable:
        return f"{type(objective).__name__}, of which capturable is False"
    if not objective.solves or not isinstance(module, Flow):
        return None
    for solver in solvers_in(objective.as_trained(module).transform):
        if not solver.fixed:
            return f"the method {solver.method}, which looks at its errors"
        if solver.compile or solver.gradient not in ("auto", "backprop"):
            return f"{solver}, whose gradient is to take another way"
    return None


class CapturedLearner(Learner):
    """A learner whose steps the device takes alone, replayed from a graph where they can be.

    A step that cannot be captured after all, since it reads a number, runs as `Learner`'s.
    """

    def __init__(
        self, module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
    ) -> None:
        super().__init__(module, objective, config, fabric)
        device = fabric.device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # good, bad, bad in a row
        self._rate = torch.zeros((), device=device)
        for group in self._adam.param_groups:
            group.update(lr=self._rate, capturable=True)
        self._warmed_up, self._since_look = 0, 0
        self._capture: _Capture | None = None
        self._refused = False
        self._side = torch.cuda.Stream() if device.type == "cuda" else None
        self._done: deque[torch.cuda.Event] = deque()  # of the last steps

    def step(self, rows: Prepared, lr: float, share: float = 1.0) -> Loss:
        if self._refused:
            return self._aside(lambda: super(CapturedLearner, self).step(rows, lr, share))
        self._rate.fill_(lr)
        if self._capture is not None and self._capture.fits(rows):
            loss = self._capture.replay(rows)
        elif self._capture is None and self._warmed_up >= WARM_UP:
            loss = self._captured(rows, lr)
        else:
            self._warmed_up += 1
            loss = self._aside(lambda: self._update(rows))
        self._wait_for_device()
        self._since_look += 1
        if self._since_look >= LOOK:
            self._look(loss)
        return loss

    def _wait_for_device(self) -> None:
        """Let the host be no more than some steps ahead, so that a clock measures the device."""
        done = torch.cuda.Event(blocking=True)  # a core that waits is free for others
        done.record()
        self._done.append(done)
        if len(self._done) > AHEAD:
            self._done.popleft().synchronize()

    def _aside(self, step: Callable[[], Loss]) -> Loss:
        """Take a step on the stream of the capture, to which the gradients belong."""
        side: Any = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = step()
        torch.cuda.current_stream().wait_stream(side)
        return loss

    def _captured(self, rows: Prepared, lr: float) -> Loss:
        try:
            self._capture = _Capture(self, rows)
        except Exception as error:  # of whatever kind: eager steps will tell, or do without
            _forget_capture(self.fabric.device)
            if self.config.compile is True:
                raise
            self._refused = True
            self._leave_out_if(None)
            first = str(error.__context__ or error).strip().split("\n")[0]
            warn(
                f"fit: steps are launched kernel by kernel, as their capture failed: {first}; "
                "compile=False says so from the start"
            )
            self._take_over()
            return self.step(rows, lr)
        return self._capture.first()

    def _update(self, rows: Prepared) -> Loss:
        """One step, of which the host reads nothing."""
        self._adam.zero_grad(set_to_none=True)
        loss = self._loss(rows)
        loss.value.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or torch.inf)
        bad = ~torch.isfinite(norm + loss.value.detach())
        self._leave_out_if(bad.float())
        self._adam.step()
        self._count(bad)
        self._average_unless(bad)
        return Loss(loss.value.detach(), loss.metrics)  # nothing keeps the autograd graph alive

    def _leave_out_if(self, bad: Tensor | None) -> None:
        """Tell the fused optimizer, which reads this where a GradScaler would write it."""
        adam: Any = self._adam
        adam.found_inf = bad

    def _count(self, bad: Tensor) -> None:
        good, skipped, in_a_row = self._counts.unbind()
        good += ~bad
        skipped += bad
        in_a_row.copy_((in_a_row + 1) * bad)

    def _average_unless(self, bad: Tensor) -> None:
        """`Learner._average` with a decay that the device computes."""
        if self.config.ema is None:
            return
        good = self._counts[0]
        decay = (good / (good + 9)).clamp(max=self.config.ema)
        weight = torch.where(bad, torch.zeros_like(decay), 1 - decay)
        with torch.no_grad():
            change = torch._foreach_sub(self._weights, self._ema_weights)  # pyright: ignore
            torch._foreach_mul_(change, weight)  # pyright: ignore
            torch._foreach_add_(self._ema_weights, change)  # pyright: ignore
            if self._buffers:
                torch._foreach_copy_(self._ema_buffers, self._buffers)  # pyright: ignore

    def _look(self, loss: Loss) -> None:
        """Read the counts, which waits for the device, and end a run that has gone bad."""
        self._since_look = 0
        self.steps, self.skipped, self._bad_in_a_row = self._counts.tolist()
        if self._bad_in_a_row >= BAD_STEPS:
            self._skipped_batch = self._batch
            self.refuse_divergence(loss, 0)

    def _take_over(self) -> None:
        self.steps, self.skipped, self._bad_in_a_row = self._counts.tolist()

    def refuse_divergence(self, loss: Loss, steps: int) -> None:
        if not self._refused:
            self._take_over()
        super().refuse_divergence(loss, steps)

    def state(self) -> dict[str, Any]:
        if not self._refused:
            self._take_over()
        return super().state()

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for group in self._adam.param_groups:  # loading has put a copy in its place
            group["lr"] = self._rate
        counts = torch.tensor([self.steps, self.skipped, 0], dtype=torch.int64)
        self._counts.copy_(counts)


class _Capture:
    """One step captured for rows of one shape.

    Args:
        learner: Whose step.
        rows: Rows of that shape, with which `first` takes the step that is captured.
    """

    def __init__(self, learner: CapturedLearner, rows: Prepared) -> None:
        self.rows = rows.map(torch.clone)
        self.tensors = _tensors(self.rows)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with ode.record() as stats, torch.cuda.graph(self.graph, stream=learner._side):
            self.loss = learner._update(self.rows)
        self.evaluations = stats.forward

    def fits(self, rows: Prepared) -> bool:
        shapes, mine = (
            [(tensor.shape, tensor.dtype) for tensor in tensors]
            for tensors in (_tensors(rows), self.tensors)
        )
        return shapes == mine

    def first(self) -> Loss:
        """Take the step with the rows that were captured, whose evaluations are counted."""
        self.graph.replay()
        return self.loss

    def replay(self, rows: Prepared) -> Loss:
        """Take the step with these rows; the loss holds its numbers until the next one."""
        for mine, value in zip(self.tensors, _tensors(rows), strict=True):
            mine.copy_(value)
        self.graph.replay()
        ode.count(self.evaluations)
        return self.loss


def _tensors(rows: Prepared) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    rows.map(keep)
    return found


def _forget_capture(device: torch.device) -> None:
    """Give torch's generator a new state: that of a capture that failed waits for its end."""
    torch.cuda.synchronize()
    fresh = torch.Generator(device)
    torch.cuda.default_generators[device.index or 0].graphsafe_set_state(
        fresh.graphsafe_get_state()
    )
