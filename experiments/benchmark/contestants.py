"""One flow, computed by this library and in the ways of its peers, all with the same weights."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torchdiffeq
from torch import Tensor, nn

import cnf
from cnf.dynamics import record
from cnf.fields import MLPField
from cnf.transforms import Continuous

FREQUENCIES = 3  # zuko's
TIGHT = 1e-7  # tolerance at which log-densities are compared, in float64


class Ours(nn.Module):
    """This library.

    Args:
        field: The velocity from base to data.
        solver: Method, tolerances, gradient mode.
        divergence: "exact" or "hutchinson".
    """

    def __init__(self, field: MLPField, solver: cnf.Solver, divergence: str = "exact") -> None:
        super().__init__()
        self.flow = cnf.Flow(None, Continuous(field, solver), event_shape=(field.dim,))
        self.divergence = divergence

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x, divergence=self.divergence)


class Plain(nn.Module):
    """FFJORD as its authors, and torchdiffeq's example, write it: a loop of D gradients.

    Source: Grathwohl et al. (2019), https://arxiv.org/abs/1810.01367, and torchdiffeq's
    examples/cnf.py. As there, every gradient of a training step is taken with create_graph; in
    `eval()` none is, to the peer's advantage.

    Args:
        field: The velocity from base to data; only its forward is called.
        solve: torchdiffeq's odeint_adjoint (FFJORD) or odeint (backprop through the solver).
        settings: Tolerances, method, options for it.
    """

    def __init__(self, field: nn.Module, solve: Callable, **settings) -> None:
        super().__init__()
        self.field, self.solve, self.settings, self.nfe = field, solve, settings, 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        x = state[0]
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            v, div = self.field(t, x), 0.0
            for i in range(x.shape[1]):
                row = torch.autograd.grad(
                    v[:, i].sum(), x, create_graph=self.training, retain_graph=True
                )[0]
                div = div + row[:, i]
        return (v, div) if self.training else (v.detach(), div.detach())

    def log_prob(self, x: Tensor) -> Tensor:
        times = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
        start = (x, x.new_zeros(len(x)))
        z, ladj = self.solve(self, start, times, **self.settings)
        return _standard_normal(z[-1]) + ladj[-1]


class Zuko(nn.Module):
    """zuko's CNF with the weights of a field with plain "input" layers.

    It carries data to base in t' = 1 - t: its velocity is the negative, and its cos(kπt') and
    sin(kπt') are (-1)^k cos(kπt) and -(-1)^k sin(kπt).
    """

    def __init__(self, field: MLPField, hidden: Sequence[int], tolerance: float) -> None:
        super().__init__()
        import zuko

        self.flow = zuko.flows.CNF(
            field.dim, freqs=FREQUENCIES, atol=tolerance, rtol=tolerance,
            hidden_features=hidden, activation=nn.SiLU,
        )  # fmt: skip
        self.nfe = 0
        transform = self.flow.transform
        self._take_weights(field, [m for m in transform.ode if isinstance(m, zuko.nn.Linear)])
        velocity = transform.f

        def counted(*arguments, **keywords) -> Tensor:
            self.nfe += 1
            return velocity(*arguments, **keywords)

        transform.f = counted

    @torch.no_grad()
    def _take_weights(self, field: MLPField, linears: Sequence[nn.Module]) -> None:
        signs = torch.tensor([(-1.0) ** k for k in range(1, FREQUENCIES + 1)])
        first = field.layers[0]
        _, sines, cosines = first.modulation.shift.weight.split([1, FREQUENCIES, FREQUENCIES], 1)
        linears[0].weight.copy_(
            torch.cat([cosines * signs, -sines * signs, first.linear.weight], 1)
        )
        for mine, linear in zip(linears[1:], linears_of(field)[1:], strict=True):
            mine.weight.copy_(linear.weight)
        for mine, linear in zip(linears, linears_of(field), strict=True):
            mine.bias.copy_(linear.bias)
        linears[-1].weight.neg_()
        linears[-1].bias.neg_()

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)


def random_field(
    dim: int, hidden: Sequence[int], layer: str = "input", evaluations: int = 50
) -> MLPField:
    """A field drawn at random, its weights raised until a solve at 1e-5 takes `evaluations`.

    Without the raise the flow is next to the identity and a solve takes 14. With "input" layers
    its column for plain t, which zuko's lacks, is zero.
    """
    if layer == "input":
        field = MLPField(dim, hidden, activation="silu", frequencies=FREQUENCIES)
        with torch.no_grad():
            field.layers[0].modulation.shift.weight[:, 0] = 0
    else:
        field = MLPField(dim, hidden, activation="tanh", frequencies=0, layer=layer)
    x = torch.randn(512, dim)
    with torch.no_grad():
        while evaluations_of(Ours(field, cnf.Solver()), x)[0] < evaluations:
            for parameter in field.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(1.2)
    return field


def plain(field: MLPField, solve: str, tolerance: float = 1e-5, steps: int | None = None) -> Plain:
    """`Plain` over torchdiffeq's solver of that name; rk4 where `steps` is given."""
    solver = getattr(torchdiffeq, solve)
    if steps:
        return Plain(field, solver, method="rk4", options={"step_size": 1 / steps})
    return Plain(field, solver, method="dopri5", rtol=tolerance, atol=tolerance)


def evaluations_of(contestant: nn.Module, x: Tensor) -> tuple[int, int]:
    """Evaluations of the field forward and, where gradients are enabled, backward."""
    contestant.nfe = 0  # pyright: ignore
    with record() as stats:
        log_prob = contestant.log_prob(x)  # pyright: ignore
        forward = contestant.nfe  # pyright: ignore
        if torch.is_grad_enabled():
            log_prob.mean().backward()
    contestant.zero_grad()
    if stats.solves:
        return stats.forward, stats.backward
    return forward, contestant.nfe - forward  # pyright: ignore


def graph_gigabytes(peer: Plain, x: Tensor, evaluations: int) -> float:
    """What backprop through so many evaluations of a peer would keep, in GB."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = peer(x.new_tensor(0.5), (x, x.new_zeros(len(x))))
    total = sum(sizes.values())  # while `kept` holds them, so that no address is used twice
    del kept
    return total * evaluations / 1e9


def training_step(contestant: nn.Module, x: Tensor, captured: bool = False) -> Callable[[], None]:
    """One step of likelihood training, at learning rate 0: every step solves the same ODE."""
    optimizer = torch.optim.Adam(contestant.parameters(), lr=0.0, fused=True, capturable=captured)

    def step() -> None:
        optimizer.zero_grad()
        (-contestant.log_prob(x).mean()).backward()  # pyright: ignore
        optimizer.step()

    return step


def captured_step(contestant: nn.Module, x: Tensor) -> Callable[[], None]:
    """The step as one CUDA graph."""
    step = training_step(contestant, x, captured=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def disagreement(field: MLPField, hidden: Sequence[int], x: Tensor) -> dict[str, float]:
    """Largest difference in log-density of each peer to us, all in float64 at `TIGHT`."""
    peers = {"plain": plain(copy.deepcopy(field), "odeint", TIGHT)}
    if layers_are_plain(field):
        peers["zuko"] = Zuko(field, hidden, TIGHT)
    ours = Ours(copy.deepcopy(field), cnf.Solver(rtol=TIGHT, atol=TIGHT)).double()
    x = x.double()
    with torch.no_grad():
        exact = ours.log_prob(x)
        return {
            name: (peer.double().eval().log_prob(x) - exact).abs().max().item()
            for name, peer in peers.items()
        }


def layers_are_plain(field: MLPField) -> bool:
    """Whether zuko has such a field."""
    return all(getattr(layer, "modulation", layer).scale is None for layer in field.layers)


def linears_of(field: MLPField) -> list[nn.Linear]:
    """The linear map of every layer, without what time adds."""
    return [getattr(layer, "linear", layer) for layer in field.layers]


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
