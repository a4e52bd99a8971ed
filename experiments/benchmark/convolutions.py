"""An evaluation of FFJORD's convolutional field and one probe, with gradients.

Beside the same layers written plainly: a channel of t joined to each layer's input, and the
estimate by a vector-Jacobian product that is differentiated again.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from measure import Options, interleaved
from tables import markdown, number
from torch import Tensor, nn

from cnf.dynamics.divergence import Hutchinson
from cnf.fields import ConvField

SHAPES = ((1, 28, 28), (4, 14, 14), (8, 7, 7))  # the first scales of a picture of 28 × 28
BATCH, HIDDEN = 64, (64, 64, 64)


class Plain(nn.Module):
    """FFJORD's ConcatConv2d layers with softplus, with the weights of a `ConvField`."""

    def __init__(self, field: ConvField) -> None:
        super().__init__()
        self.layers = field.layers

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = F.softplus(x) if k else x
            x = layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))
        return x


def run(options: Options) -> dict:
    batch = 2 if options.quick else BATCH
    return {str(shape): _case(shape, batch, options) for shape in SHAPES}


def _case(shape: Sequence[int], batch: int, options: Options) -> dict:
    torch.manual_seed(0)
    field = ConvField(shape, HIDDEN, layer="concat").to(options.device)
    plain, t = Plain(field), torch.tensor(0.3, device=options.device)
    x, of_v = torch.randn(2, batch, *shape, device=options.device)
    of_div = torch.randn(batch, device=options.device)
    probe = torch.randint_like(x, 0, 2) * 2 - 1
    hutchinson, weights = Hutchinson(probe=probe[None]), list(field.parameters())

    def gradients(v: Tensor, div: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((v * of_v).sum() + (div * of_div).sum(), [y, *weights])

    def ours() -> tuple[Tensor, ...]:
        y = x.clone().requires_grad_()
        rates = hutchinson.rates(field, t, y, None, probe[None])
        return gradients(rates.velocity, rates.divergence[:, 0], y)

    def theirs() -> tuple[Tensor, ...]:
        y = x.clone().requires_grad_()
        v = plain(t, y)
        (product,) = torch.autograd.grad(v, y, probe, create_graph=True)
        return gradients(v, (product * probe).flatten(1).sum(1), y)

    for one, other in zip(ours(), theirs(), strict=True):
        assert (one - other).norm() < 1e-4 * other.norm(), "the gradients differ"
    return interleaved({"ours": ours, "plain": theirs}, options)


def table(found: dict) -> str:
    rows = [
        (shape, number(case["ours"]["median"]), number(case["plain"]["median"]),
         number(case["ours"]["median"] / case["plain"]["median"]))
        for shape, case in found.items()
    ]  # fmt: skip
    return markdown(("images", "ours, ms", "plain, ms", "ours / plain"), rows)
