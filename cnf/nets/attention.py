"""Which kernel computes attention."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernel(x: Tensor) -> AbstractContextManager[object]:
    """A context manager for attention in a network of x, which x may be differentiated through.

    Only torch's plain kernel has the second derivative that the gradient of a divergence takes;
    the fused ones are taken where x needs no gradient, as in flow matching.

    Args:
        x: The input of the network.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
