"""Shared fixtures: seeded generators, and modules with random weights in float64."""

import math
import os

import pytest
import torch

import cnf
from cnf.registry import options_of
from cnf.transforms import Standardize

# One thread, here and in what the tests start: nets this small gain nothing from a second one, and
# two busy processes with two threads each are many times slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _same_first_weights():
    """Modules start from torch's own generator: the same in each test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    """A generator of its own for each test, always the same."""
    return torch.Generator().manual_seed(20240229)


@pytest.fixture
def randomized(generator):
    """module → the module in float64 with every parameter drawn anew (a flow that starts as the
    identity would hide a missing term), and preprocessing that is not the identity."""

    def randomize(module, gain=0.9):
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(draw * gain / math.sqrt(fan_in))
        for part in module.modules():
            if isinstance(part, Standardize):  # of data, and inside StandardizeContext
                shape = (64, *part.event_shape)
                draw = torch.randn(shape, generator=generator, dtype=torch.float64)
                spread = 1 + torch.arange(part.loc.numel()).reshape(part.loc.shape) / 4
                part.fit(draw * spread + 0.5)
            if hasattr(part, "initialized"):  # actnorm: its parameters are drawn above
                part.initialized.fill_(True)
        return module

    return randomize


@pytest.fixture
def small_flow(randomized):
    """(name, context) → the named model, small, in float64, with random weights and a tight
    solver where it has one."""

    def build(name, context=0, dim=2, solver=None, gain=0.9, **options):
        known = options_of(cnf.models.MODELS[name])
        if "hidden" in known:
            options.setdefault("hidden", (12, 12))
        if context:
            options["context"] = context
        if "frequencies" in known:
            options.setdefault("frequencies", 1)  # four make the field turn fast: many evaluations
        if "solver" in known:
            options["solver"] = solver or cnf.Solver(rtol=1e-9, atol=1e-9)
        return randomized(cnf.models.build(name, dim=dim, **options), gain)

    return build


@pytest.fixture
def config():
    """TrainConfig with a tiny budget; any setting can be given."""

    def make(**settings):
        budget = {} if "seconds" in settings else {"steps": 6}
        small = {"batch_size": 16, "validation_rows": 50, "progress": False, "device": "cpu"}
        return cnf.TrainConfig(**{**budget, **small, **settings})

    return make


@pytest.fixture
def pretended():
    """The device of `tests/pretended.py`, which counts kernels and waits."""
    from tests.pretended import pretended_device

    with pretended_device() as there:
        yield there


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=CUDA)])
def device(request):
    """A device other than the CPU: a pretended one anywhere, and CUDA's where there is one."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    request.getfixturevalue("pretended")
    from tests.pretended import DEVICE

    return DEVICE


def pytest_configure(config):
    """torch scripts its forward-mode decompositions at first use, which it deprecates itself."""
    config.addinivalue_line(
        "filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    )
