"""NVIDIA GPUs: the CUDA sources, compiled at first use by NVRTC through cuda-core, and the structs that they take.

Compiled kernels are kept in the user's cache folder. Without cuda-core, or on a GPU older than compute capability 8.0, the
PyTorch references run, and a warning says so once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvmosaic.codecs import Codec, Coupled, Exact, Levels, Rotated, Sphere, Uniform, sphere_levels
from kvmosaic.kernels.layout import Role

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes

FOLDER = Path(__file__).parent
NUMBERS = {torch.bfloat16: 0, torch.float16: 1}
MOST_CHANNELS = 256
FITS = ("", "norm", "matched", "unbiased", "least")

MOST_STORES = 4
INCLUDED = ("warp.cuh", *(f"attention/{name}.cuh" for name in ("work", "streams", "combine")), "encode/append.cuh")
THREADS = 128
"""Of a block, unless a kernel says otherwise."""

H100_SHARED = 227 * 1024
"""Bytes of shared memory that a block of threads can have there."""

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Lane(ctypes.Structure):
    """`struct Lane` of warp.cuh."""

    _fields_ = [
        *(
            (name, _pointer)
            for name in (
                "codes",
                "scale",
                "low",
                "channel",
                "exact",
                "learned",
                "restored",
                "where",
                "missing",
                "position",
                "turns",
                "coded",
                "starts",
            )
        ),
        *((name, _int64) for name in ("code_stride", "entry_stride", "exact_room")),
        *((name, _int) for name in ("ring", "runs", "position_room", "position_heads")),
        ("stretch", ctypes.c_float),
    ]


class Store(ctypes.Structure):
    """`struct Store`."""

    _fields_ = [("keys", Lane), ("values", Lane), ("length", _pointer)]


class Fresh(ctypes.Structure):
    """`struct Fresh`."""

    _fields_ = [("keys", _pointer), ("values", _pointer), ("key_strides", _int64 * 3), ("value_strides", _int64 * 3),
                ("count", _int)]  # fmt: skip


class Joined(ctypes.Structure):
    """`struct Joined` of attention/combine.cuh. held: its tensors, which must outlive the launch that joins them."""

    held: tuple[Tensor, ...] = ()
    _fields_ = [
        *((name, _pointer) for name in ("out", "most", "sum", "rows", "lse", "numbers")),
        ("unrotate", _pointer * MOST_STORES), ("first", _int * (MOST_STORES + 1)), ("tails", _int * MOST_STORES),
        *((name, _int) for name in ("stores", "count")),
    ]  # fmt: skip


class StepEnd(ctypes.Structure):
    """`struct StepEnd` of encode/append.cuh."""

    _fields_ = [
        *((name, _pointer) for name in ("length", "slot", "arrived", "live")),
        ("fresh", Fresh), ("joined", Joined), ("heads", _int),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one side of a store is written, as the sources' macros say it (attention/cuda.cu)."""

    form: int = 0  # 0 exact, 1 ranges by channel, 2 ranges by token
    bits: int = 8
    group: int = 0  # tokens that share a channel's range; 0 = a run
    groups: int = 1  # ranges of a token
    factor: int = 0
    low: int = 1
    step: float = 1.0
    zero: float = 0.0
    table: int = 0
    levels: tuple[int, ...] = (0, 0, 0, 0)
    fit: int = 0  # of fixed levels, as encode/cuda.cu numbers them; 0 = ranges
    unit: float = 0.0
    rotation: int | None = None  # its seed

    @property
    def by_run(self) -> bool:
        """Whether a run of tokens shares parameters."""
        return bool(self.factor) or (self.form == 1 and not self.group)

    def macros(self, role: Role) -> dict[str, str]:
        values = asdict(self) | {
            **{name: f"{getattr(self, name):.9e}f" for name in ("step", "zero", "unit")},
            "levels": ",".join(f"{word}u" for word in self.levels),
        }
        values["rotated"] = int(values.pop("rotation") is not None)
        return {f"{role[:-1]}_{name}".upper(): str(value) for name, value in values.items()}


def form(codec: Codec, role: Role, channels: int) -> Form | str:
    """The form of a codec; or why the kernels cannot serve it."""
    if channels > MOST_CHANNELS or channels % 16:
        return f"head size {channels}: served are multiples of 16 up to {MOST_CHANNELS}"
    if isinstance(codec, Exact):
        return Form()
    if isinstance(codec, Rotated):
        inner = form(codec.codec, role, channels)
        return inner if isinstance(inner, str) else replace(inner, rotation=codec.seed)
    if isinstance(codec, Sphere):
        if codec.bits == 3:
            return "no CUDA form of codes in two planes (3 bits)"
        unit, integers = sphere_levels(channels, codec.bits)
        fixed = Form(form=2, bits=codec.bits, low=0, fit=FITS.index(codec.scale), unit=unit / channels**0.5)
        if codec.bits < 3:  # the levels are 2 * code - (2**bits - 1)
            return replace(fixed, step=2.0, zero=(2**codec.bits - 1) / 2)
        raised = (integers.int() + 64).to(torch.uint8).view(4, 4).tolist()
        return replace(
            fixed, zero=64.0, table=1, levels=tuple(int.from_bytes(bytes(four), "little") for four in raised)
        )
    if not isinstance(codec, Uniform):
        return f"no CUDA form of {type(codec).__name__}"
    if codec.axis == "channel":
        if codec.group is None:
            return Form(form=1, bits=codec.bits)
        if role == "values" or codec.group % 32:
            return (
                f"ranges of {role} by channel over {codec.group} tokens: served are keys, over multiples of 32 tokens"
            )
        return Form(form=1, bits=codec.bits, group=codec.group)
    group = codec.group or channels
    if group != channels and (role == "keys" or group % 16):
        return f"ranges of {role} by token over {group} channels: served are values, over multiples of 16 channels"
    return Form(form=2, bits=codec.bits, groups=channels // group, factor=int(codec.equalize))


def describe(lane: LaneBytes) -> Lane:
    """A lane's tensors as the kernels see them; they must outlive the launch."""
    described = Lane(coded=lane.coded.data_ptr(), ring=lane.lane.ring, runs=lane.starts.shape[2])
    if "numbers" in lane.buffers:
        exact = lane.ring if lane.lane.ring else lane.buffers["numbers"]
        described.ring = 0  # no token of a window is behind it (`attention.cuda.serves`), so none has gone round
    else:
        exact = lane.ring
        codes = lane.buffers["codes"]
        described.code_stride = codes.shape[2] * codes.shape[3]
        described.starts = lane.starts.data_ptr()
        for name in ("codes", "scale", "low", "channel", "where", "missing"):
            if name in lane.buffers:
                setattr(described, name, lane.buffers[name].data_ptr())
        if "scale" in lane.buffers:
            described.entry_stride = lane.buffers["scale"].shape[2] * lane.buffers["scale"].shape[3]
        codec = lane.lane.codec
        if isinstance(codec, Coupled):
            described.learned = codec.centroids.data_ptr()
        if isinstance(codec, Levels):
            described.restored = codec.restored.data_ptr()
            if codec.ranges is None:
                described.scale = lane.buffers["range"].data_ptr()
            else:
                described.learned = codec.ranges.data_ptr()
        if lane.rotary is not None:
            plain = lane.rotary.plain(lane.channels, lane.coded.device)
            assert plain is not None, "asked before"
            described.turns, described.stretch = plain[0].data_ptr(), plain[1]
            described.position = lane.position.data_ptr()
            described.position_heads, described.position_room = lane.position.shape[1:3]
    described.exact, described.exact_room = exact.data_ptr(), exact.shape[2]
    return described


def fresh(keys: Tensor, values: Tensor) -> Fresh:
    """Exact tokens of a step, [B, H, T, D] with unit stride in the last dimension."""
    return Fresh(
        keys.data_ptr(), values.data_ptr(), (_int64 * 3)(*keys.stride()[:3]), (_int64 * 3)(*values.stride()[:3]),
        keys.shape[2],
    )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on one device."""

    function: Any
    threads: int
    shared: int  # bytes of a block, beside those that the source declares
    resident: int  # blocks of threads that the whole GPU runs at once

    def __call__(self, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        """Queue it on torch's current stream. The struct is copied before this returns."""
        from cuda.bindings import driver

        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver.cuLaunchKernel(
                self.function, *grid, self.threads, 1, 1, self.shared, stream, ctypes.addressof(pointers), 0
            )
        )


@lru_cache(maxsize=8)
def why_not(device: torch.device) -> str | None:
    """Why no CUDA kernel runs on a device; None if they do. A reason is logged, once."""
    missing = None
    if device.type != "cuda":
        return f"the device is {device}, not an NVIDIA GPU"
    if torch.version.cuda is None:
        missing = "this build of torch has no CUDA"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        missing = f"compute capability 8.0 is needed, and this GPU has {torch.cuda.get_device_capability(device)}"
    elif importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        missing = "cuda-core is not installed (pip install 'kvmosaic[gpu]')"
    if missing:
        logging.getLogger("kvmosaic").warning(
            "the CUDA kernels do not run (%s): PyTorch runs in their place, many times slower", missing
        )
    return missing


def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have; an H100's where there is no GPU."""
    if device.type != "cuda":
        return H100_SHARED
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_checked(driver.cuDeviceGetAttribute(attribute, device.index or 0)))


def kernel(
    file: str, name: str, macros: Mapping[str, str], device: torch.device, threads: int = THREADS, shared: int = 0
) -> Kernel:
    """The kernel `name` of a source in this folder, for these macros; shared: bytes that its POOL has."""
    return _kernel(file, name, tuple(sorted(macros.items())), device, threads, shared)


@lru_cache(maxsize=1024)
def _kernel(
    file: str, name: str, macros: tuple[tuple[str, str], ...], device: torch.device, threads: int, shared: int
) -> Kernel:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # torch's context is the one that is current from here on
        properties = torch.cuda.get_device_properties(device)
        code = _compiled(file, macros, f"sm_{properties.major}{properties.minor}")
        library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        function = _checked(driver.cuKernelGetFunction(_checked(driver.cuLibraryGetKernel(library, name.encode()))))
        if shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, shared))
        blocks = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared))
        return Kernel(function, threads, shared, blocks * properties.multi_processor_count)


def _compiled(file: str, macros: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """Machine code, from the cache folder if it was compiled before."""
    from cuda.core import Program, ProgramOptions, __version__

    source = (FOLDER / file).read_text()
    told = repr((source, [(FOLDER / each).read_text() for each in INCLUDED], macros, arch, __version__))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmosaic"
    kept = folder / f"{hashlib.sha256(told.encode()).hexdigest()}.cubin"
    if kept.exists():
        return kept.read_bytes()
    options = ProgramOptions(std="c++17", arch=arch, include_path=[str(FOLDER)], define_macro=list(macros))
    code = bytes(Program(source, "c++", options).compile("cubin").code)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as written:
            written.write(code)
        os.replace(written.name, kept)  # whole or not at all, whoever else compiles the same
    except OSError as error:
        logging.getLogger("kvmosaic").warning("compiled kernels cannot be kept in %s: %s", folder, error)
    return code


def _checked(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver refused: {error!r}")
    return values[0] if values else None
