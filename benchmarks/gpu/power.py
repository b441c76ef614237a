"""A second reading of a GPU's energy: its power, sampled and integrated over time, to check the counter."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np

INTERVAL_S = 0.02


class PowerSamples:
    """Samples power in a thread while the block runs.

    Args:
        read_w: returns the power now, in watts.

    Attributes:
        error: why sampling ended early; None if it did not.
    """

    def __init__(self, read_w: Callable[[], float]) -> None:
        self._read_w = read_w
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.error: str | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        try:
            while not self._stop.is_set():
                self._samples.append((time.perf_counter(), self._read_w()))
                self._stop.wait(INTERVAL_S)
            self._samples.append((time.perf_counter(), self._read_w()))
        except Exception as error:  # NVML has a class for each of its errors
            self.error = f"{type(error).__name__}: {error}"

    @property
    def energy_j(self) -> float | None:
        """The integral of the samples; None if sampling failed."""
        if self.error or len(self._samples) < 2:
            return None
        times, watts = np.array(self._samples).T
        return float(np.trapezoid(watts, times))


def card_power() -> Callable[[], float]:
    """Returns a function that reads the power of torch's first GPU through NVML, in watts."""
    handle = card_handle(0)

    def read_w() -> float:
        import pynvml

        return pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3

    return read_w


def card_handle(index: int) -> Any:
    """Returns NVML's handle of torch's GPU `index`, which NVML may number otherwise."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
