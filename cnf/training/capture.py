"""Training steps on a GPU, captured as a CUDA graph once and then replayed.

A small model's step is hundreds or thousands of kernels of a few microseconds each, which Python
launches more slowly than the device runs them. A captured step reads no value on the host, so that
nothing waits: the device itself skips the update of a bad step, and counts it.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cnf.dynamics import ode
from cnf.errors import warn
from cnf.objectives import Loss, Objective
from cnf.objectives.batch import Prepared, tensors_of
from cnf.training.config import TrainConfig
from cnf.training.learner import BAD_STEPS, Learner, first_decay
from cnf.training.recorded import Conditions, agrees

WARM_UP = 3  # steps before the capture, in which libraries allocate what they need
AHEAD = 2  # steps by which the host may be ahead of the device
LOOK = 50  # steps between two readings of the counts of bad ones


class CapturedLearner(Learner):
    """A learner that captures its step as a CUDA graph, and replays it.

    Where the capture fails, as when the objective reads a value on the host, it warns and goes on
    with the steps of `Learner`.
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
        self._done: deque[torch.cuda.Event] = deque()  # of the last steps, in order

    def step(self, rows: Prepared, lr: float, share: float = 1.0) -> Loss:
        if self._refused:
            return self._aside(lambda: super(CapturedLearner, self).step(rows, lr, share))
        self._rate.fill_(lr)
        if self._capture is not None and self._capture.conditions.hold(rows):
            loss = self._replayed(rows)
            if self._refused:
                return loss
        elif self._capture is None and self._warmed_up >= WARM_UP:
            loss = self._capture_and_step(rows, lr)
        else:
            self._warmed_up += 1
            loss = self._aside(lambda: self._update(rows))
        self._wait_for_device()
        self._since_look += 1
        if self._since_look >= LOOK:
            self._look(loss)
        return loss

    def _wait_for_device(self) -> None:
        """Keep the host at most `AHEAD` steps ahead, so that a clock measures the device."""
        done = torch.cuda.Event(blocking=True)  # the core sleeps while it waits
        done.record()
        self._done.append(done)
        if len(self._done) > AHEAD:
            self._done.popleft().synchronize()

    def _aside(self, step: Callable[[], Loss]) -> Loss:
        """Run a step on the stream of the capture, where the gradients were allocated."""
        side: Any = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = step()
        torch.cuda.current_stream().wait_stream(side)
        return loss

    def _capture_and_step(self, rows: Prepared, lr: float) -> Loss:
        """Capture a step and take it; where that fails, take an uncaptured one from now on."""
        try:
            self._capture = _Capture(self, rows)
            self.compiled = True
        # Of any kind: if it is the objective's own, the next step raises it again.
        except Exception as error:
            _forget_capture(self.fabric.device)
            if self.config.compile is True:
                raise
            self._refused = True
            self._leave_out_if(None)
            first = str(error.__context__ or error).strip().split("\n")[0]
            warn(
                f"fit: steps are launched kernel by kernel, as their capture failed: {first}; "
                "compile=False does without the attempt"
            )
            self._take_over()
            return self.step(rows, lr)
        return self._capture.first()

    def _replayed(self, rows: Prepared) -> Loss:
        """The captured step; from where it computes something else than the module, plain ones."""
        capture = self._capture
        assert capture is not None
        plain = capture.conditions.plain_loss_if_due(rows)
        loss = capture.replay(rows)
        if plain is not None and not agrees(loss.value, plain):
            self._capture, self._refused, self.compiled = None, True, False
            self._leave_out_if(None)
            self._take_over()
        return loss

    def _update(self, rows: Prepared) -> Loss:
        """One step that reads no value on the host."""
        loss, norm = self._gradient(rows)
        bad = ~torch.isfinite(norm + loss.value.detach())
        self._leave_out_if(bad.float())
        self._adam.step()
        self._count(bad)
        self._average_unless(bad)
        self._keep_buffers_unless(bad)
        return Loss(loss.value.detach(), loss.metrics)  # nothing keeps the autograd graph alive

    def _loss_of(self, rows: Prepared) -> Loss:
        return super()._loss_of(rows) if self._refused else self._loss(rows)

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss) if self._refused else loss.backward()

    def _leave_out_if(self, bad: Tensor | None) -> None:
        """Tell the fused optimizer to skip its update where `bad` is 1, as a GradScaler does."""
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
        decay = first_decay(self._counts[0]).clamp(max=self.config.ema)
        weight = torch.where(bad, torch.zeros_like(decay), 1 - decay)
        with torch.no_grad():
            change = torch._foreach_sub(self._weights, self._ema_weights)  # pyright: ignore
            torch._foreach_mul_(change, weight)  # pyright: ignore
            torch._foreach_add_(self._ema_weights, change)  # pyright: ignore

    @torch.no_grad()
    def _keep_buffers_unless(self, bad: Tensor) -> None:
        """`Learner._keep_buffers`, or the buffers as they were before a bad step."""
        for buffer, kept in zip(self._buffers, self._kept_buffers, strict=True):
            kept.copy_(torch.where(bad, kept, buffer))
            buffer.copy_(kept)

    def _look(self, loss: Loss) -> None:
        """Read the counts, which waits for the device, and end a run whose steps are all bad."""
        self._since_look = 0
        self._take_over()
        if self._bad_in_a_row >= BAD_STEPS:
            self._skipped_batches = self._batches
            self.refuse_divergence(loss, 0)

    def _take_over(self) -> None:
        """Read the device's counts into those of `Learner`."""
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
        for group in self._adam.param_groups:  # loading replaced it by a copy
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
        self.conditions = Conditions(learner._loss, rows)
        self.rows = rows.map(torch.clone)
        self.tensors = tensors_of(self.rows)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with ode.record() as stats, torch.cuda.graph(self.graph, stream=learner._side):
            self.loss = learner._update(self.rows)
        self.evaluations = stats.forward

    def first(self) -> Loss:
        """Take the step with the captured rows; the capture counted its evaluations."""
        self.graph.replay()
        return self.loss

    def replay(self, rows: Prepared) -> Loss:
        """Take the step with these rows; the next step overwrites the loss."""
        for mine, value in zip(self.tensors, tensors_of(rows), strict=True):
            mine.copy_(value)
        self.graph.replay()
        ode.count(self.evaluations)
        return self.loss


def _forget_capture(device: torch.device) -> None:
    """Give torch's generator a new state: after a failed capture the old one cannot draw."""
    torch.cuda.synchronize()
    fresh = torch.Generator(device)
    torch.cuda.default_generators[device.index or 0].graphsafe_set_state(
        fresh.graphsafe_get_state()
    )
