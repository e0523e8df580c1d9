"""Peak: how many floating-point operations a second a device can do, to compare a pass's with.

In: a device and a precision. Out: FLOP/s, configured or measured by a large matrix product. Knows no model.
"""

from __future__ import annotations

import time
from functools import cache

import torch

SIZE, TIMES = 4096, 8  # 1.1 TFLOP in all: milliseconds on a GPU, and its pipes are full


def device_peak(device: torch.device, dtype: torch.dtype, configured_tflops: float | None = None) -> float | None:
    """FLOP/s of `device` in `dtype`: `configured_tflops` (10¹² FLOP/s) if given; a GPU's measured, once a process.

    None for a CPU, whose cores are shared with others and whose measurement would take them from the work, and for a
    GPU with no room left for it.
    """
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type != "cuda":
        return None
    try:
        return measured(device, dtype)
    except torch.OutOfMemoryError:
        return None


@cache
def measured(device: torch.device, dtype: torch.dtype, size: int = SIZE) -> float:
    """FLOP/s of products of two [size, size] matrices, the best of some."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(TIMES):
        _wait(device)
        began = time.perf_counter()
        torch.matmul(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
