"""Memory on a CUDA device, through the runtime library that ONNX Runtime has loaded already."""

from __future__ import annotations

import ctypes
from typing import Any

from numpy.typing import NDArray

_DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 2, 3
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


class CudaError(RuntimeError):
    """A call of the CUDA runtime that failed, with its own words."""


class CudaMemory:
    """A ``server.device.device_caches.DeviceMemory``. Copies run on the default stream.

    Raises:
        CudaError: when the library is not there, or memory runs out.
    """

    def __init__(self, device: int = 0) -> None:
        self._library = _load()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._check(self._library.cudaSetDevice(device))

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._check(self._library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)))
        self._check(self._library.cudaMemset(pointer, 0, ctypes.c_size_t(size)))
        assert pointer.value is not None
        return pointer.value

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        size = ctypes.c_size_t
        self._check(
            self._library.cudaMemcpy2DAsync(
                ctypes.c_void_p(target),
                size(target_pitch),
                ctypes.c_void_p(source),
                size(source_pitch),
                size(width),
                size(height),
                _DEVICE_TO_DEVICE,
                None,
            )
        )

    def fetch(self, source: int, target: NDArray[Any]) -> None:
        """Fills a contiguous host array from the device; done when it returns."""
        size = ctypes.c_size_t(target.nbytes)
        self._check(
            self._library.cudaMemcpy(ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(source), size, _DEVICE_TO_HOST)
        )

    def synchronize(self) -> None:
        # ONNX Runtime works on a stream of its own that does not wait for the default one.
        self._check(self._library.cudaStreamSynchronize(None))

    def _check(self, status: int) -> None:
        if status:
            raise CudaError(self._library.cudaGetErrorString(status).decode())


def _load() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"none of {', '.join(_LIBRARIES)} is there")
