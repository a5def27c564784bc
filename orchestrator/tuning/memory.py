"""The memory that this process uses, of the accelerator or of the machine, in bytes."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class Memory:
    """A meter of the memory in use and its peak since ``start_over``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start_over(self) -> int:
        """Reset the peak and return the memory in use."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_reserved(self._device)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # Not allowed everywhere. The peak then counts from the process's start, loading
            # included.
            return self.peak()
        return _status("VmRSS")

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        if Path("/proc/self/status").exists():
            return _status("VmHWM")
        import resource

        # In bytes on systems without /proc (macOS).
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def room(self) -> int:
        """Return the total memory of the accelerator, or of the machine or its control group."""
        if self._device.type == "cuda":
            return int(torch.cuda.get_device_properties(self._device).total_memory)
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            if Path(file).is_file() and (text := Path(file).read_text().strip()).isdecimal():
                limits.append(int(text))
        return min(limits)


def _status(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
