"""The memory of a process, now and at its peak.

On Linux the kernel keeps the highest resident size of a process (`VmHWM`), which can be set back; on a GPU PyTorch's
allocator does. Elsewhere the memory is not known.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class Meter:
    """The memory of this process on a device."""

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"

    def reset(self) -> int | None:
        """Gives back what is free, sets the peak back, and returns the bytes that are held, or None if unknown."""
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return self._resident("VmRSS")

    def peak(self) -> int | None:
        """The most bytes that were held since `reset`, or None if unknown."""
        return torch.cuda.max_memory_allocated() if self._on_gpu else self._resident("VmHWM")

    @staticmethod
    def _resident(field: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
