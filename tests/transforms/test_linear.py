"""Linear transforms: matrices, determinants and initial values."""

import pytest
import torch

from cnf.transforms import LU, Householder, Permutation, Rotation

F64 = torch.float64


def matrix(transform, dim):
    """The matrix of the map data → base."""
    rows, _ = transform.inverse(torch.eye(dim, dtype=F64))
    return rows.T


def test_permutation_follows_its_order_which_is_saved_in_state_dict():
    transform = Permutation(4, [2, 0, 3, 1])
    z = torch.tensor([10.0, 11.0, 12.0, 13.0])
    assert transform(z)[0].tolist() == [12, 10, 13, 11]
    assert Permutation(3)(z[:3])[0].tolist() == [12, 11, 10]
    other = Permutation(4)
    other.load_state_dict(transform.state_dict())
    assert torch.equal(other(z)[0], transform(z)[0])
    assert torch.equal(other.inverse(other(z)[0])[0], z)
    with pytest.raises(ValueError, match="each of 0, …, 2 once"):
        Permutation(3, [0, 1, 1])


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_lu_starts_at_the_identity_or_at_a_rotation(dim):
    eye = torch.eye(dim, dtype=F64)
    torch.testing.assert_close(matrix(LU(dim).double(), dim), eye)
    start = matrix(LU(dim, rotated=True).double(), dim)
    torch.testing.assert_close(start @ start.T, eye, rtol=0, atol=1e-6)
    assert dim == 1 or (start - eye).abs().max() > 0.1


@pytest.mark.parametrize("rotated", [False, True])
def test_lu_is_the_product_of_its_factors(rotated, randomized):
    transform = randomized(LU(4, rotated))
    lower = transform.lower.tril(-1) + torch.eye(4, dtype=F64)
    upper = transform.upper.triu(1) + torch.diag(transform.signs * transform.log_diagonal.exp())
    whole = torch.eye(4, dtype=F64)[transform.order] @ lower @ upper
    found = matrix(transform, 4) - transform.bias[:, None]
    torch.testing.assert_close(found, whole)
    _, ladj = transform.inverse(torch.zeros(4, dtype=F64))
    torch.testing.assert_close(ladj, torch.linalg.slogdet(whole).logabsdet)


@pytest.mark.parametrize("transform", [Householder(5, 3), Householder(5, 5), Rotation(5)])
def test_orthogonal_matrices_are_orthogonal(transform, randomized):
    q = matrix(randomized(transform), 5)
    torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=F64), rtol=0, atol=1e-12)
    assert (q - torch.eye(5, dtype=F64)).abs().max() > 0.1


def test_reflection_and_rotation_by_hand():
    mirror, turn = Householder(2, 1).double(), Rotation(2).double()
    with torch.no_grad():
        mirror.vectors.copy_(torch.tensor([[3.0, 4.0]]))
        turn.generator.copy_(torch.tensor([[0.0, -0.3], [0.0, 0.0]]))
    z = torch.tensor([1.0, 0.0], dtype=F64)  # less 2·(3/5)·(3, 4)/5
    torch.testing.assert_close(mirror(z)[0], torch.tensor([0.28, -0.96], dtype=F64))
    angle = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(turn(z)[0], torch.stack([angle.cos(), angle.sin()]))


@pytest.mark.parametrize("layer", [LU(6, rotated=True), Householder(6, 3), Rotation(6)])
def test_linear_maps_do_not_use_autocast(layer, randomized, generator):
    layer = randomized(layer).float()
    x = torch.randn(50, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = layer.inverse(x)
        again, _ = layer(z)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, layer.inverse(x)[0])
    torch.testing.assert_close(again, x, rtol=1e-3, atol=1e-3)
