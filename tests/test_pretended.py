"""The pretended device behaves as CUDA would, and tells what a host would wait for."""

import io

import pytest
import torch

import cnf
from tests.pretended import DEVICE, Pretended, pretended_device


def there(*shape):
    return torch.rand(*shape, generator=torch.Generator(DEVICE), device=DEVICE)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.lerp(x, x, y),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.add_(y),
        lambda x, y: torch._foreach_add([x], [y]),
        lambda x, y: torch.stack([x.sum(), y.sum()]),
    ],
)
def test_tensors_of_two_devices_are_refused(operation, pretended):
    with pytest.raises(RuntimeError, match="expected all tensors on lazy:0, got one of shape"):
        operation(there(2, 2), torch.ones(2, 2))


def test_a_number_of_the_cpu_may_scale(pretended):
    assert (there(3) * torch.tensor(2.0)).device == DEVICE


def test_a_generator_draws_on_its_own_device_alone(pretended):
    with pytest.raises(
        RuntimeError, match="randn: expected a generator on lazy:0, got one on cpu"
    ):
        torch.randn(3, generator=torch.Generator(), device=DEVICE)
    with pytest.raises(RuntimeError, match="randn: expected a generator on cpu, got one on lazy"):
        torch.randn(3, generator=torch.Generator(DEVICE))


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "to the device": lambda x: torch.ones(3).to(DEVICE),
    "copied into": lambda x: x.copy_(torch.ones(3)),
    "copied out": lambda x: torch.ones(3).copy_(x),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=DEVICE),
    "a new tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "a mask": lambda x: x[x > 0],
    "an index of the host": lambda x: x[torch.tensor([0, 1])],
    "repeats": lambda x: x.repeat_interleave(x.long() + 1),
}


@pytest.mark.parametrize("case", WAITS)
def test_a_read_or_copy_is_a_wait_at_its_line(case, pretended):
    x = there(3)
    pretended.forget()
    WAITS[case](x)
    assert len(pretended.waits) == 1 and " in test_pretended.py:" in pretended.waits[0]


def test_operations_that_need_no_value_are_no_waits(pretended):
    x = there(3, 2)
    pretended.forget()
    _ = x.sum(), x[0], x[:, x.long()[0]], torch.where(x > 0, x, 0.0), x.sort(), x.cumsum(0)
    x[x > 0.5] = 0.0
    _ = torch.arange(3, device=DEVICE), torch.eye(2, device=DEVICE), x.new_zeros(3), x.float()
    assert pretended.waits == []


def test_views_and_memory_are_no_kernels(pretended):
    x = there(3, 2)
    pretended.forget()
    _ = x.T[0].unsqueeze(0).expand(4, 3), torch.empty(3, device=DEVICE), x.detach()
    assert pretended.kernels.total() == 0
    (x + 1).neg_()
    assert pretended.kernels == {"add": 1, "neg_": 1}


def test_gradients_and_shapes_are_those_of_the_cpu(pretended):
    layer, x = torch.nn.Linear(3, 2), torch.randn(3)
    torch.func.jvp(layer, (x,), (x,))[1].sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    layer.to(DEVICE)
    x = x.to(DEVICE)
    tangent = torch.func.jvp(layer, (x,), (x,))[1]  # of one row, whose axis is added and removed
    tangent.sum().backward()
    assert tangent.shape == (2,)
    torch.testing.assert_close(layer.weight.grad.cpu(), expected)


def test_a_module_moves_with_its_parameters_the_same_objects(pretended):
    layer = torch.nn.Linear(3, 2)
    before = list(layer.parameters())
    layer.to(DEVICE)
    after = list(layer.parameters())
    assert all(a is b and type(b) is Pretended for a, b in zip(before, after, strict=True))


def test_saved_tensors_come_back_on_the_cpu(pretended):
    file, x = io.BytesIO(), there(3)
    torch.save({"x": x}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)["x"]
    assert read.device.type == "cpu" and torch.equal(read, x.cpu())


class Misplaced(cnf.matching.paths.Linear):
    """A path with a constant that was left on the CPU."""

    def sample(self, x0, x1, t, noise=None):
        return super().sample(x0 + torch.ones(2), x1, t, noise)


def test_a_constant_left_on_the_cpu_is_found_in_a_step(pretended):
    flow = cnf.models.cnf(2, hidden=(4,)).to(DEVICE)
    objective = cnf.FlowMatching(path=Misplaced())
    with pytest.raises(RuntimeError, match="add: expected all tensors on lazy:0"):
        objective(flow, cnf.Batch(there(4, 2)), torch.Generator(DEVICE))


def test_afterwards_torch_is_as_it_was():
    def settings():
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        return torch.Generator, torch.autocast, torch.is_autocast_enabled, swaps

    before = settings()
    with pretended_device():
        assert all(a is not b for a, b in zip(settings(), before, strict=True))
    assert settings() == before
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device=DEVICE)
