"""The compiled CPU kernels: finding them, choosing a variant for this CPU, and the structs that they take.

The library is built as an optional extension when the package is installed (`setup.py`) and called through ctypes.
Without it the PyTorch references run, and a warning says so once. KVMOSAIC_CPU forces a variant: avx512vnni,
avxvnni, avx2, neon, plain, or reference.
"""

import ctypes
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

DONE, BAD_LENGTHS, NO_MEMORY = range(3)
MOST_CHANNELS = 256
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
AXES = {"channel": 0, "token": 1}
ROLES = {"keys": 0, "values": 1}
KEEP = {"norm": 0, "matched": 1, "unbiased": 2, "least": 3}

_pointer, _int, _int64, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _fields(**types: Any) -> list[tuple[str, Any]]:
    """name="names of one type" for each type, in the order of native.h."""
    return [(name, kind) for names, kind in types.values() for name in names.split()]


class Lane(ctypes.Structure):
    """`struct lane` of native.h."""

    _fields_ = _fields(
        pointers=("codes top levels rotation numbers scale low channel coded starts ring", _pointer),
        sizes=("room blocks entries runs ring_room ring_size group", _int64),
        kinds=("bits axis number role", _int),
    )


class Exact(ctypes.Structure):
    """`struct exact`: tokens as they are, [B, H, T, D] with any strides but the last."""

    _fields_ = _fields(
        pointers=("start", _pointer), strides=("batch_stride head_stride token_stride", _int64), kinds=("number", _int)
    )

    @classmethod
    def of(cls, x: Tensor) -> "Exact":
        batch_stride, head_stride, token_stride, _ = x.stride()
        return cls(x.data_ptr(), batch_stride, head_stride, token_stride, NUMBERS[x.dtype])


class Attention(ctypes.Structure):
    """`struct attention`."""

    _fields_ = [
        *_fields(lanes=("keys values", Lane), fresh=("fresh_keys fresh_values", Exact)),
        *_fields(
            pointers=("length query out lse parallel", _pointer), sizes=("batch heads rows channels fresh", _int64)
        ),
        *_fields(floats=("scale softcap affine_low affine_high", _float), flags=("affine official threads", _int)),
    ]


class Encoding(ctypes.Structure):
    """`struct encoding`."""

    _fields_ = [
        *_fields(lane=("lane", Lane), x=("x", Exact), pointers=("count clip parallel", _pointer)),
        *_fields(sizes=("batch heads channels", _int64), unit=("unit", _float)),
        *_fields(flags=("about_center keep threads", _int)),
    ]


@dataclass(frozen=True)
class Kernels:
    """The loaded library, and the variant that serves; `library` None = the references serve, `why` says why."""

    library: Any
    variant: str
    why: str
    parallel: int | None = None
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; None = one thread."""

    def attend(self, arguments: Attention) -> int:
        arguments.parallel, arguments.threads = self.parallel, torch.get_num_threads()
        return int(self.library.kvmosaic_attend(self._name, ctypes.byref(arguments)))

    def encode(self, arguments: Encoding) -> int:
        arguments.parallel, arguments.threads = self.parallel, torch.get_num_threads()
        return int(self.library.kvmosaic_encode(self._name, ctypes.byref(arguments)))

    @property
    def _name(self) -> bytes:
        return self.variant.encode()


def runnable() -> list[str]:
    """The compiled variants that this CPU can run, best first; empty without the library."""
    library, _ = _load()
    if library is None:
        return []
    return [name.decode() for name in takewhile(bool, library.kvmosaic_variants())]


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """What serves on this CPU. Raises ValueError if KVMOSAIC_CPU asks for what cannot run here."""
    asked = os.environ.get("KVMOSAIC_CPU", "")
    if asked == "reference":
        return Kernels(None, "reference", "KVMOSAIC_CPU asks for it")
    library, why = _load()
    if asked and asked not in runnable():
        here = ", ".join([*runnable(), "reference"])
        raise ValueError(f"KVMOSAIC_CPU is {asked!r}, which cannot run here; this machine has {here}")
    if library is None:
        logging.getLogger("kvmosaic").warning(
            "the compiled CPU kernels are missing (%s): PyTorch runs in their place, many times slower", why
        )
        return Kernels(None, "reference", why)
    variant = asked or runnable()[0]
    return Kernels(library, variant, "KVMOSAIC_CPU asks for it" if asked else "the best for this CPU", _parallel())


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str]:
    spec = importlib.util.find_spec("kvmosaic.kernels._native")
    if spec is None or spec.origin is None:
        return None, "they were not built: no C compiler when the package was installed"
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, str(error)
    library.kvmosaic_variants.restype = ctypes.POINTER(ctypes.c_char_p)
    return library, ""


def _parallel() -> int | None:
    """torch has loaded its OpenMP runtime for the whole process, so its threads can be borrowed by name."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None
