"""A loss and its gradient as one compiled program, for a CPU.

A small model's step is hundreds of operations of a few microseconds each, between which Python and
autograd take as long as the operations. Here the step runs once for real while every operation of
its forward and backward pass is recorded, so that no code has to suit the compiler; TorchInductor
fuses the record into a few loops.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnf.dynamics import fixed
from cnf.objectives import Loss
from cnf.objectives.batch import Prepared, tensors_of
from cnf.training.recorded import Conditions

NARROW = 12  # columns


class Program:
    """The loss of rows of one shape, its gradient, and the gradient's norm.

    The module's tensors are read at each call; Python's numbers in it, modes and branches stay as
    they were recorded. TorchInductor keeps what it compiled on the disk, so that the next process
    has it within seconds.

    Args:
        loss: A module that gives the `Loss` of prepared rows, and computes the same of them and
            its own tensors each time.
        trained: The parameters to differentiate.
        rows: Rows of that shape, for which the step is recorded.
        clip: Largest norm of the gradient, or None.

    Attributes:
        size: Number of recorded operations.
        conditions: Those under which it computes what the module does.
        parameters: Those of `trained` on which the loss depends.

    Raises:
        RuntimeError: The loss reads a number on the host, or draws with a generator; a tensor of
            the module overlaps itself, as `expand` makes one.
    """

    def __init__(
        self, loss: nn.Module, trained: Sequence[nn.Parameter], rows: Prepared, clip: float | None
    ) -> None:
        self.conditions = Conditions(loss, rows, draws_alike=True)
        self._tensors = dict(loss.named_parameters()) | dict(loss.named_buffers())
        if any(value.stride() != value.clone().stride() for value in self._tensors.values()):
            raise RuntimeError("a parameter or a buffer of the module overlaps itself")
        wanted = {id(parameter) for parameter in trained if parameter.requires_grad}
        trainable = [name for name, value in self._tensors.items() if id(value) in wanted]
        if len(trainable) < len(wanted):
            raise RuntimeError("the objective trains parameters that are not the module's")
        # What the loss depends on, and what it tells, is known when `step` has run to be recorded.
        self._metrics: tuple[str, ...] = ()
        self.parameters: list[nn.Parameter] = []

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(self._tensors, inputs, strict=False))
            for name in trainable:
                values[name] = values[name].detach().requires_grad_()
            own = iter(inputs[len(values) :])
            with torch.enable_grad():
                found: Loss = functional_call(loss, values, (rows.map(lambda _: next(own)),))
                leaves = [values[name] for name in trainable]
                gradient = torch.autograd.grad(found.value, leaves, allow_unused=True)
            self._metrics = tuple(found.metrics)
            pairs = zip(trainable, gradient, strict=True)
            used = {name: part for name, part in pairs if part is not None}
            self.parameters = [self._tensors[name] for name in used]  # pyright: ignore
            gradient = torch.cat([part.reshape(-1) for part in used.values()])
            norm = torch.linalg.vector_norm(gradient)
            if clip is not None:  # as torch.nn.utils.clip_grad_norm_ does
                gradient = gradient * (clip / (norm + 1e-6)).clamp(max=1.0)
            return found.value.detach(), norm, gradient, *found.metrics.values()

        try:
            self._graph = _recorded(step, [*self._tensors.values(), *_dense(rows)])
        except RuntimeError as error:
            if "tracing tensor" not in str(error):
                raise
            raise RuntimeError(
                "fit: the loss reads a number on the host, which cannot be recorded; build the "
                "torch.distributions in a log-density with validate_args=False, or give "
                "ReverseKL capturable=False"
            ) from error
        self.size = len(self._graph.graph.nodes)
        self._call: Any = self._graph

    @cached_property
    def code(self) -> str:
        """The record as text with its shapes, which tells programs apart."""
        return self._graph.print_readable(print_output=False)

    def compile(self) -> None:
        """Compile the record, which until then is replayed operation by operation."""
        from torch._inductor import compile as compiled
        from torch._inductor import config
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # With a ShapeEnv TorchInductor finds what it has on the disk: 0.4 s instead of 17 (nsf).
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
        inputs = [node.meta["val"] for node in self._graph.graph.find_nodes(op="placeholder")]
        fake: list[Any] = [mode.from_tensor(value) for value in inputs]
        # Dropout draws as without compilation; inductor's own draws are slower on a CPU.
        with torch.no_grad(), config.patch(fallback_random=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
            self._call = compiled(self._graph, fake)

    def __call__(self, rows: Prepared) -> tuple[Loss, Tensor, Tensor]:
        """The loss, the norm of its gradient, and the clipped gradient of all `parameters`.

        Args:
            rows: Rows with which the conditions hold.

        Returns:
            The loss, the norm, shape (), and the gradient, side by side, shape (P,).
        """
        with torch.no_grad():
            value, norm, gradient, *metrics = self._call(*self._tensors.values(), *_dense(rows))
        return Loss(value, dict(zip(self._metrics, metrics, strict=True))), norm, gradient


def _recorded(
    step: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> torch.fx.GraphModule:
    """The operations of a step; it sees copies, as it may change its buffers."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad(), fixed.recorded():
        record = make_fx(step)(*(value.detach().clone() for value in inputs))
    _turn_narrow_products(record.graph)
    record.recompile()
    return record


def _turn_narrow_products(graph: torch.fx.Graph) -> None:
    """Compute AᵀB as (BᵀA)ᵀ where B has a few columns: MKL takes a fifth of the time for it.

    Such is the gradient of the weights of a layer with few inputs.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        a, b = node.args
        narrow = 1 < b.meta["val"].shape[1] <= NARROW < a.meta["val"].shape[0]
        if not narrow or a.meta["val"].stride(0) != 1:
            continue
        with graph.inserting_before(node):
            turned = [graph.call_function(aten.t.default, (part,)) for part in (b, a)]
            product = graph.call_function(aten.mm.default, tuple(turned))
            back = graph.call_function(aten.t.default, (product,))
            layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
            node.replace_all_uses_with(graph.call_function(aten.clone.default, (back,), layout))
        graph.erase_node(node)


def _dense(rows: Prepared) -> list[Tensor]:
    """The tensors of rows, each in memory of its own order, as the record has them."""
    return [value.contiguous() for value in tensors_of(rows)]
