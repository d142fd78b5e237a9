"""How much memory a device still has to give."""

from __future__ import annotations

import psutil
import torch


def free_memory(device: str) -> int:
    """Bytes that can still be had: of the GPU, what this process keeps unused included; or of the main memory."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)
