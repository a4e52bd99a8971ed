"""Standardization of contexts, fitted once, so that networks get inputs of unit scale."""

import torch
from torch import Tensor, nn

from cnf.errors import expect_context
from cnf.printing import named
from cnf.transforms.preprocessing import Standardize


class StandardizeContext(nn.Module):
    """The map c → (c - loc)/scale of contexts, as `Standardize` is of data; it is not trained.

    A column of zeros and ones, such as that of a label, is not changed. NaN, a missing value,
    stays NaN and has no effect on the statistics. Before it is fitted, the map is the identity.

    >>> import torch
    >>> seconds = 1.7e9 + torch.tensor([[0.0], [60.0], [120.0]], dtype=torch.float64)
    >>> standardize = StandardizeContext(1)
    >>> standardize.fit(seconds)
    >>> standardize(seconds).flatten().tolist()
    [-1.0, 0.0, 1.0]

    Args:
        size: Size C of the context.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.columns = Standardize((size,))

    def fit(self, context: Tensor) -> None:
        """Set location and scale from contexts, shape (N, C), unless they are set already."""
        expect_context("fit", context, self.size)
        if self.fitted:
            return
        loc, scale = self.columns.loc.clone(), self.columns.scale.clone()
        for k, column in enumerate(context.to(loc).unbind(-1)):
            known = column[~column.isnan()]
            if ((known != 0) & (known != 1)).any():
                loc[k] = known.mean()
                if known.amax() > known.amin():
                    scale[k] = known.std()  # a constant column has scale 1
        self.columns.settle({"loc": loc, "scale": scale}, context.dtype)

    @property
    def fitted(self) -> bool:
        """Whether location and scale are set."""
        return bool(self.columns.fitted)

    @property
    def dtype(self) -> torch.dtype:
        """float64 where it was fitted to float64 contexts, else float32."""
        return self.columns.dtype

    @property
    def unresolved(self) -> tuple[int, ...]:
        """Indices of the columns whose distinct values would be equal in float32."""
        return self.columns.unresolved

    def __repr__(self) -> str:
        return named(self, self.columns.extra_repr())

    def forward(self, context: Tensor) -> Tensor:
        return (context - self.columns.loc) / self.columns.scale
