"""How much memory training takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Peak memory inside, in MB: a GPU's, else the whole process's (NaN off Linux).

    The peak that PyTorch or Linux keeps begins anew for it. Where Linux does not allow that, as
    in some containers, it is the process's since its start.

    Args:
        device: Where training is.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 1e6
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    with suppress(OSError):
        reset.write_text("5")  # sets VmHWM, the peak, to VmRSS, the present

    def peak() -> float:
        lines = status.read_text().splitlines() if status.exists() else []
        found = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        return float(next(found, "nan")) / 1e3

    yield peak
