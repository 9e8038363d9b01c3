"""How much memory a call needs beyond what is there when it starts.

On a GPU: the allocator's peak. On a CPU under Linux: the process's peak resident memory, which the
kernel keeps (`VmHWM`) and resets on request (`/proc/self/clear_refs`, proc(5)).
"""

import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class PeakMemory:
    """Measures what runs between `start` and `bytes_needed`."""

    def __init__(self, device: torch.device):
        """`device`: where the work is done."""
        self.device = device
        self.held: int | None = None

    def start(self) -> None:
        """Forgets earlier peaks."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.held = torch.cuda.memory_allocated(self.device)
            return
        try:
            CLEAR.write_text(RESET_PEAK)
            self.held = _resident("VmRSS")
        except OSError:
            self.held = None

    def bytes_needed(self) -> int | None:
        """Bytes at the peak since `start`, less those held then; None where they are not known."""
        if self.held is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.held
        return max(0, _resident("VmHWM") - self.held)


def _resident(key: str) -> int:
    """A field of the process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
