"""How much memory a device has."""

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """What nobody uses, with what torch keeps of a GPU's memory for itself and has not given out."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def bytes_at_once(device: torch.device, of_cpu: int, share_of_gpu: float) -> int:
    """What a pass may hold: on a GPU a share of all its memory, on a CPU so many bytes, whose caches are as small."""
    if device.type != "cuda":
        return of_cpu
    return int(share_of_gpu * torch.cuda.get_device_properties(device).total_memory)
