"""llama.cpp's attention over its own cache types, called in its library: as the Python package llama-cpp-python installs
it, or a folder with libggml-base.so and libggml-cpu.so of a build of ggml.
"""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The library. Raises OSError if it is not in the folder."""

    def __init__(self, folder: Path) -> None:
        self.base, self.cpu = (
            ctypes.CDLL(str(folder / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("base", "cpu")
        )

    @staticmethod
    def folder() -> Path | None:
        """Of llama-cpp-python, if it is installed."""
        spec = importlib.util.find_spec("llama_cpp")
        return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self.base, name, None) or getattr(self.cpu, name)
        function.restype = result
        return function(*arguments)


class FlashAttention:
    """One decode step: query [H, G, D] over keys, values [H, S, D], float32; called, it gives the output [H, G, D]."""

    def __init__(self, ggml: Ggml, kind: str, query: Tensor, keys: Tensor, values: Tensor, threads: int) -> None:
        self.ggml, (heads, tokens, channels) = ggml, keys.shape
        room = 2**20 + sum(x.nbytes for x in (query, query, keys, values))  # more than any type here takes
        self.context = ctypes.c_void_p(ggml.call("ggml_init", ctypes.c_void_p, _InitParams(room, None, False)))
        q = self._tensor(F32, channels, 1, query.shape[0] * query.shape[1])
        k, v = (self._tensor(TYPES[kind], channels, tokens, heads) for _ in range(2))
        ctypes.memmove(self._data(q), query.contiguous().data_ptr(), query.nbytes)
        for tensor, numbers in ((k, keys.contiguous()), (v, values.contiguous())):
            row, rows = ctypes.c_int64(channels), ctypes.c_int64(heads * tokens)
            source = ctypes.c_void_p(numbers.data_ptr())
            ggml.call(
                "ggml_quantize_chunk", ctypes.c_size_t, TYPES[kind], source, self._data(tensor), ctypes.c_int64(0), rows, row, None
            )  # fmt: skip
        scale, zero = ctypes.c_float(channels**-0.5), ctypes.c_float(0)
        pointer = ctypes.c_void_p
        self.out = pointer(ggml.call("ggml_flash_attn_ext", pointer, self.context, q, k, v, None, scale, zero, zero))
        self.graph = pointer(ggml.call("ggml_new_graph", pointer, self.context))
        ggml.call("ggml_build_forward_expand", None, self.graph, self.out)
        self.backend = pointer(ggml.call("ggml_backend_cpu_init", pointer))
        ggml.call("ggml_backend_cpu_set_n_threads", None, self.backend, threads)
        self.shape = query.shape

    def __call__(self) -> None:
        if self.ggml.call("ggml_backend_graph_compute", ctypes.c_int, self.backend, self.graph):
            raise RuntimeError("ggml's graph did not run")

    def result(self) -> Tensor:
        out = torch.empty(self.shape)
        ctypes.memmove(out.data_ptr(), self._data(self.out), out.nbytes)
        return out

    def _tensor(self, kind: int, *sizes: int) -> ctypes.c_void_p:
        sizes64 = (ctypes.c_int64(size) for size in sizes)
        return ctypes.c_void_p(self.ggml.call("ggml_new_tensor_3d", ctypes.c_void_p, self.context, kind, *sizes64))

    def _data(self, tensor: ctypes.c_void_p) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.ggml.call("ggml_get_data", ctypes.c_void_p, tensor))
