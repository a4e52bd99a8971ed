"""Multilayer perceptrons, and what networks of linear layers share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.errors import is_count
from cnf.nets.activations import ACTIVATIONS


class MLP(nn.Module):
    """A multilayer perceptron (*, inputs) → (*, outputs).

    Args:
        inputs: Size of the last axis of the input.
        outputs: Size of the last axis of the output.
        hidden: Widths of the hidden layers.
        activation: A name in `ACTIVATIONS`.
        zero_last: Initialize the last layer to zero, so that a flow starts as the identity.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        zero_last: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in linear_sizes("MLP", [inputs, *hidden, outputs])
        )
        self.activation = ACTIVATIONS[activation]
        if zero_last:
            zero_(self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = self.activation.function(layer(x))
        return last(x)

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(layer.out_features for layer in self._linears()[:-1])

    def columns(self, x: Tensor) -> Tensor:
        """The transposed output (outputs, N) of an input (N, inputs).

        The N values of each output and of each hidden unit are contiguous in memory.
        """
        *inner, last = [(layer.weight, layer.bias) for layer in self._linears()]
        h = x.T
        for weight, bias in inner:
            h = self.activation.function(linear_of_columns(h, weight, bias))
        return linear_of_columns(h, *last)

    def _linears(self) -> list[nn.Linear]:
        return list(self.layers)  # pyright: ignore


def linear_sizes(who: str, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (inputs, outputs) of consecutive layers.

    Args:
        who: Whose layers they are, for the message.
        sizes: Widths of the input, of the hidden layers and of the output.

    Raises:
        ValueError: A width is not a whole number of at least 1.
    """
    for size in sizes:
        if not is_count(size) or size < 1:
            raise ValueError(f"{who}: expected every width >= 1, got {tuple(sizes)}")
    return list(zip(sizes[:-1], sizes[1:], strict=True))


def linear_of_columns(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer on columns.

    Args:
        h: Inputs, shape (inputs, N).
        weight: Shape (outputs, inputs).
        bias: Shape (outputs,).

    Returns:
        Outputs, shape (outputs, N).
    """
    return torch.addmm(bias.unsqueeze(-1), weight, h)


def zero_(layer: nn.Module) -> None:
    """Set a linear layer's weight and bias to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
