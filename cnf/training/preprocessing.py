"""Preprocessing is fitted to the first rows; data that stay far from unit scale are warned of."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cnf.errors import abbreviated
from cnf.flow import Flow
from cnf.objectives import Batch
from cnf.random import stream
from cnf.transforms.base import Compose, Transform
from cnf.transforms.manifolds import UnitVectors
from cnf.transforms.normalization import ActNorm, BatchNorm
from cnf.transforms.preprocessing import Standardize
from cnf.transforms.squashing import Sigmoid

FAR = 30.0  # spreads of the base: beyond, an untrained net sees nothing but that


@torch.no_grad()
def fit_preprocessing(module: nn.Module, head: Batch | None) -> None:
    """Fit to the first rows what is not fitted yet, of the data and of their context.

    `fit` does so; a loop of one's own calls it before its first step, as preprocessing that is not
    fitted leaves data as they are.

    Args:
        module: A flow, or another module, for which nothing is done.
        head: Rows with their contexts, some thousand or all; None for none.

    Raises:
        ValueError: Rows are outside of what preprocessing maps, as a logit's interval.
    """
    if head is None:
        return
    for name, rows in (("preprocess", head.x), ("context_preprocess", head.context)):
        part: Any = getattr(module, name, None)
        if rows is None or part is None or not rows[0].numel():
            continue
        rows = rows.to(next(part.buffers(), rows).device)
        if name == "preprocess" and isinstance(module, Flow) and module.dequantization:
            draws = stream(0, "noise of preprocessing")
            dtype = torch.promote_types(module.dtype, torch.float32)
            rows, _ = module.dequantization.encode(rows.to(dtype), draws)
        if hasattr(part, "fit"):
            part.fit(rows)
        if name == "preprocess" and isinstance(part, Transform):
            _expect_in_support(part, rows)
    if isinstance(module, Flow) and module.dequantization is None:
        for name, text in _far(module, head):
            if text is not None:
                module.warn_once(name, text)


@torch.no_grad()
def expect_held_out_in_support(module: nn.Module, held_out: Batch | None) -> None:
    """Raise ValueError for held-out rows that would be refused as training rows.

    Their density is 0, and the held-out NLL would be infinite.

    Args:
        module: A flow, or another module, for which nothing is done.
        held_out: The rows; None for none.
    """
    if held_out is None or not isinstance(module, Flow) or module.dequantization is not None:
        return  # which looks at pixels itself
    if isinstance(module.preprocess, UnitVectors):
        module.preprocess.expect_unit_vectors("held-out rows", held_out.x)
    elif module.preprocess is not None:
        _expect_in_support(module.preprocess, held_out.x.to(module.device), "held-out rows")


def _expect_in_support(preprocess: Transform, rows: Tensor, name: str = "rows") -> None:
    """Raise ValueError for rows that a part of the preprocessing, such as a logit, cannot map."""
    parts: Any = preprocess.transforms if isinstance(preprocess, Compose) else [preprocess]
    if not any(isinstance(part, Sigmoid) for part in parts):
        return
    for part in reversed(list(parts)):
        y, ladj = part.inverse(rows)
        outside = int((ladj == -math.inf).sum()) if isinstance(part, Sigmoid) else 0
        if outside:
            low, high = part.support
            raise ValueError(
                f"fit: {outside} of {len(rows)} {name} are outside of the interval from {low:g} "
                f"to {high:g} that the logit of preprocess maps, with numbers from "
                f"{rows.min():g} to {rows.max():g}: their density is 0; give the logit levels=…, "
                "or build a model of pixels with dequantization='uniform'"
            )
        rows = y


@torch.no_grad()
def _far(flow: Flow, head: Batch) -> Iterator[tuple[str, str | None]]:
    """Name and warning of data and contexts that are not near unit scale where nets see them."""
    if head.x[0].numel():
        y, _ = flow.inside(head.x.to(flow.device))
        z = flow.base.sample((1_000,), stream(0, "spread of the base")).to(y)
        spread = z.std(0).clamp(min=1e-12)
        yield "x", _scale_warning("x", flow.preprocess, (y - z.mean(0)) / spread, flow)
    if head.context is not None and flow.context_dim:
        inner = flow.inner_context("fit", head.context.to(flow.device), None)
        assert inner is not None
        yield "context", _scale_warning("context", flow.context_preprocess, inner, flow)


def _scale_warning(name: str, part: nn.Module | None, value: Tensor, flow: Flow) -> str | None:
    value = value.flatten(1)
    loc, scale = value.nanmean(0).abs(), (value - value.nanmean(0)).square().nanmean(0).sqrt()
    far = (loc > FAR) | (scale > FAR)
    if part is not None:
        if not far.any():
            return None
        return (
            f"fit: columns {_columns(far)} of {name} are up to "
            f"{torch.maximum(loc, scale).max():.3g} scales from what the flow's preprocessing "
            "was fitted to, which stays so that the weights keep their meaning. Are they in "
            "the same units? For other data build a new flow"
        )
    far |= (scale > 0) & (scale < 1 / FAR)
    inside = (isinstance(m, Standardize | ActNorm | BatchNorm) for m in flow.transform.modules())
    if flow.spec is not None or not far.any() or any(inside):  # a named model was told so
        return None
    line = {
        "x": f"preprocess=cnf.transforms.Standardize({flow.event_shape})",
        "context": f"context_preprocess=cnf.transforms.StandardizeContext({flow.context_dim})",
    }[name]
    return (
        f"fit: columns {_columns(far)} of {name} are far from unit scale, which training "
        f"expects; write cnf.Flow(…, {line})"
    )


def _columns(far: Tensor) -> str:
    return abbreviated(far.nonzero().flatten().tolist())
