"""Rows that a flow maps to where its base has no density."""

import torch

from cnf.flow import Flow, evaluating
from cnf.objectives import Batch


def outside_of_base(flow: Flow, rows: Batch) -> str | None:
    """How many of the rows have z outside of the base's support, in words; None if none has."""
    with evaluating(flow), torch.no_grad():
        z = flow.encode(rows.x, rows.context)
        count = int((flow.base.log_prob(z) == -torch.inf).sum())
    if not count:
        return None
    return (
        f"{count} of {len(rows.x)} rows are mapped to z outside of the base's support "
        f"({flow.base.support}), where their log-density is -inf; take a base without bounds, "
        "such as the standard normal (base=None)"
    )
