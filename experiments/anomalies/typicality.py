"""How anomalous rows are, by the share of held-out normal rows that are as anomalous."""

import numpy as np
import torch

from cnf.metrics import row_scores


def p_values(held_out: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a low score, and of a score that is low or high: two arrays of shape (M,).

    The second is a test of typicality of single rows, after Nalisnick et al. (2019),
    https://arxiv.org/abs/1906.02994: a row is as atypical with too high a log-density. Both are
    valid for rows exchangeable with the held-out ones: P(p <= a) <= a, for the second to a rank.

    Args:
        held_out: Scores of normal rows that the model was not trained on, shape (N,).
        scored: Scores of rows, such as log-densities, shape (M,).
    """
    below = (1 + (held_out[:, None] <= scored).sum(0)) / (1 + len(held_out))
    two_sided = row_scores(torch.as_tensor(scored), torch.as_tensor(held_out)).p_value
    return below, two_sided.numpy()
