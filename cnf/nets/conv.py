"""A residual network of convolutions, the conditioner of image flows."""

from collections.abc import Sequence

from torch import Tensor, nn

from cnf.nets.activations import ACTIVATIONS
from cnf.nets.mlp import linear_sizes, zero_


class ResidualConvNet(nn.Module):
    """A residual network of convolutions, (N, inputs, H, W) → (N, outputs, H, W).

    A 3×3 convolution, blocks h + W₂ ∗ σ(W₁ ∗ σ(h)) of two 3×3 convolutions, and a 1×1 convolution
    of σ(h), which is zero at the start. There is no normalization.

    Source: He et al. (2016), https://arxiv.org/abs/1603.05027; as a conditioner, Dinh et al.
    (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    >>> import torch
    >>> ResidualConvNet(2, 6, hidden=(8, 8, 8))(torch.zeros(5, 2, 7, 7)).shape
    torch.Size([5, 6, 7, 7])

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        hidden: Channels of each block, all equal.
        activation: A name in `ACTIVATIONS`.

    Raises:
        ValueError: Blocks differ in their channels, or there is none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if len(set(hidden)) != 1:
            raise ValueError(
                "ResidualConvNet: expected blocks of one width, such as hidden=(64, 64), got "
                f"{tuple(hidden)}"
            )
        self.hidden, width = tuple(hidden), hidden[0]
        linear_sizes("ResidualConvNet", [inputs, width, outputs])
        self.activation = ACTIVATIONS[activation]
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2)) for _ in hidden
        )
        self.last = nn.Conv2d(width, outputs, 1)
        zero_(self.last)

    def forward(self, x: Tensor) -> Tensor:
        sigma, h = self.activation.function, self.first(x)
        for first, second in self.blocks:  # pyright: ignore
            h = h + second(sigma(first(sigma(h))))
        return self.last(sigma(h))
