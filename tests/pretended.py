"""A device that is not there, on which a machine without a GPU finds what a GPU would.

Its tensors have their numbers on the CPU, so that all is computed as it is there. As on CUDA, an
operation refuses tensors and generators of two devices, and the host waits for the device wherever
it copies from or to it, reads a number, or needs a count to know a shape.

Its type is PyTorch's "lazy", the only one without a runtime that autograd takes.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from weakref import WeakValueDictionary

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from cnf.training.config import DEVICES
from cnf.training.learner import launch_fabric as launch_on_others

DEVICE = torch.device("lazy", 0)
CPU = torch.device("cpu")
HERE = (str(Path(__file__).parent.parent / "cnf"), str(Path(__file__).parent))
COPIES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index")
NO_KERNEL = {  # they allocate memory, or look at what is there
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "lift_fresh", "_efficientzerotensor", "_unsafe_view", "_reshape_alias", "is_same_size",
    "_has_same_storage_numel",
}  # fmt: skip
AUTOCAST = ("autocast", "get_autocast_dtype", "is_autocast_enabled")
READS = {"multinomial"}  # it checks its probabilities
CPUGenerator = torch.Generator


class Pretended(torch.Tensor):
    """A tensor on the pretended device.

    Attributes:
        numbers: The same on the CPU.
    """

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE,
            storage_offset=numbers.storage_offset(),
        )  # fmt: skip

    def __init__(self, numbers):
        self.numbers = numbers

    def __repr__(self):
        return f"Pretended({self.numbers})"

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, told):
        return format(self.item(), told) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol):
        return self.numbers.__reduce_ex__(protocol)

    def untyped_storage(self):
        return self.numbers.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return computed(op, args, kwargs or {})


def computed(op, args, kwargs):
    """What an operation gives on the CPU, put onto the pretended device."""
    wrappers = {}

    def bare(value):
        if isinstance(value, Pretended):
            wrappers[id(value.numbers)] = value
            return value.numbers
        return CPU if isinstance(value, torch.device) else value

    def put(value):  # an operation in place returns its own argument
        if not isinstance(value, torch.Tensor):
            return value
        return wrappers[id(value)] if id(value) in wrappers else Pretended(value)

    if op is torch.ops.aten._efficientzerotensor.default:  # forward mode's, without memory
        op = torch.ops.aten.zeros.default
    found = op(*mapped(bare, args), **{name: mapped(bare, kwargs[name]) for name in kwargs})
    if torch.Tag.inplace_view in op.tags:
        reshape(args[0])
    return mapped(put, found)


def reshape(value):
    """Give a tensor the shape that its numbers have now; lazy tensors have no operation for it."""
    numbers, key = value.numbers, torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
    torch.ops.aten.as_strided_.default.redispatch(
        key, value, numbers.size(), numbers.stride(), numbers.storage_offset()
    )


def mapped(function, value):
    """A value, or the values of nested lists, after a function; five times as fast as a pytree."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, each) for each in value])
    return function(value)


def leaves(values):
    """The values of nested lists, one after the other."""
    found = []
    mapped(found.append, values)
    return found


class PretendedDevice(TorchDispatchMode):
    """The device while it is there: it checks what is launched on it, and counts.

    Attributes:
        kernels: Operations by name, other than views.
        waits: What the host waited for, and the line that made it.
    """

    def __init__(self):
        super().__init__()
        self.forget()

    def forget(self):
        """Count from zero."""
        self.kernels, self.waits = Counter(), []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        given = leaves([args, list(kwargs.values())])
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        there = [isinstance(each, Pretended) for each in tensors]
        target = kwargs.get("device")
        if not any(there) and target != DEVICE:
            self.expect_generator(name, given, CPU)
            return op(*args, **kwargs)
        if name in COPIES and not (all(there) and target in (None, DEVICE)):
            return self.copy(op, name, args, kwargs)
        self.expect_generator(name, given, DEVICE)
        self.expect_one_device(op, name, tensors)
        if self.reads(op, name, args):
            self.wait(name)
        if not (op.is_view or name in NO_KERNEL or name == "_local_scalar_dense"):
            self.kernels[name] += 1
        return computed(op, args, kwargs)

    def copy(self, op, name, args, kwargs):
        """A copy between the host's memory, which is not pinned, and the device."""
        self.wait("copy")
        if name == "copy_":
            into, source = args[:2]
            bare = source.numbers if isinstance(source, Pretended) else source
            (into.numbers if isinstance(into, Pretended) else into).copy_(bare)
            return into
        bare = args[0].numbers if isinstance(args[0], Pretended) else args[0]
        found = op(bare, *args[1:], **{**kwargs, "device": CPU})
        found = found.clone() if found is bare else found
        return Pretended(found) if kwargs["device"] == DEVICE else found

    def expect_generator(self, name, given, device):
        for each in given:
            if not isinstance(each, CPUGenerator):
                continue
            got = DEVICE if each._cdata in PretendedGenerator.there else CPU
            if got != device:
                raise RuntimeError(f"{name}: expected a generator on {device}, got one on {got}")

    def expect_one_device(self, op, name, tensors):
        """Operations on the elements take a number of the CPU, others nothing of it."""
        for each in tensors:
            number = each.dim() == 0 and torch.Tag.pointwise in op.tags
            if not (isinstance(each, Pretended) or number or name in INDEXED):
                raise RuntimeError(
                    f"{name}: expected all tensors on {DEVICE}, got one of shape "
                    f"{tuple(each.shape)} on {each.device}"
                )

    def reads(self, op, name, args):
        """Whether the host reads a number, or the shape of what comes depends on numbers."""
        if name in INDEXED:
            index = [each for each in args[1] if each is not None]
            filled = len(args) > 2 and args[2].dim() == 0  # x[mask] = 0.0 needs no count
            masks = any(each.dtype in (torch.bool, torch.uint8) for each in index)
            return (masks and not filled) or not all(isinstance(i, Pretended) for i in index)
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        return name in READS or bool(tags & set(op.tags))

    def wait(self, what):
        self.waits.append(f"{what} in {caller()}")


def caller():
    """The line of this library, or of a test, that is running."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(HERE) and path != __file__:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward pass"


class _Kind(type(CPUGenerator)):
    """Generators of the CPU are instances too, as `isinstance(…, torch.Generator)` asks."""

    def __instancecheck__(cls, value):
        return isinstance(value, CPUGenerator)


class PretendedGenerator(CPUGenerator, metaclass=_Kind):
    """A generator that may be on the pretended device.

    Attributes:
        there: Those that are, by the place in memory that PyTorch hands to operations.
    """

    there = WeakValueDictionary()

    def __new__(cls, device="cpu"):
        pretends = torch.device(device).type == DEVICE.type
        generator = super().__new__(cls, "cpu" if pretends else device)
        if pretends:
            cls.there[generator._cdata] = generator
        return generator

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return DEVICE if self._cdata in self.there else CPU


class Accelerator(CPUAccelerator):
    """What Fabric asks for beside a device."""

    def setup_device(self, device):
        pass


def launch_fabric(config, dtype):
    """`cnf.training.learner.launch_fabric`, which also knows the pretended device."""
    if config.device != DEVICE.type:
        return launch_on_others(config, dtype)
    precision = "64-true" if dtype == torch.float64 else "32-true"
    strategy = SingleDeviceStrategy(DEVICE, accelerator=Accelerator())
    fabric = Fabric(strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def is_other(device):
    """Whether a device is another than the CPU."""
    return device.type != "cpu"


def of_cpu(function):
    """A function of a type of device, which takes the pretended one for a CPU."""

    def called(kind="cpu", *args, **kwargs):
        return function("cpu" if kind == DEVICE.type else kind, *args, **kwargs)

    return called


@contextlib.contextmanager
def pretended_device() -> Iterator[PretendedDevice]:
    """Make `DEVICE` a device of this process, on which `fit` trains.

    Modules move to it as to CUDA, their parameters staying the same objects.
    """
    lifts_on_cpu = torch._C._only_lift_cpu_tensors()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    kinds = lambda: [DEVICE.type, "cpu"]  # noqa: E731
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_on_cpu)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes them there, and copies
        torch.__future__.set_swap_module_params_on_conversion(True)
        for name, value in (
            ("torch.Generator", PretendedGenerator),
            *((f"torch.{name}", of_cpu(getattr(torch, name))) for name in AUTOCAST),
            ("torch.optim.optimizer._get_fused_kernels_supported_devices", kinds),
            ("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", kinds),
            ("torch.utils._foreach_utils._foreach_supported_types", [torch.Tensor, Pretended]),
            ("cnf.training.config.DEVICES", (*DEVICES, DEVICE.type)),
            ("cnf.training.learner.launch_fabric", launch_fabric),
            *((f"cnf.training.{module}.draws_itself", is_other) for module in ("loop", "stream")),
        ):
            stack.enter_context(mock.patch(name, value))
        yield stack.enter_context(PretendedDevice())


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Let a step believe that it is captured as a CUDA graph."""
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
    ):
        yield
