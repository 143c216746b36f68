"""The CUDA sources on a CPU: compiled with emulate.h by a C++ compiler, and put in the place of a GPU's kernels.

KVMOSAIC_EMULATOR_FLAGS: more options for the compiler, e.g. those of a sanitizer (docs/gpu.md).
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from kvmosaic.kernels import attention, encode, gpu
from kvmosaic.kernels.layout import layout_of
from kvmosaic.stores import lane

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
SOURCE = """
#define KVMOSAIC_EMULATE
{macros}
#include "{file}"
template <class Arguments>
static void launch_as(void (*kernel)(Arguments), const void* arguments, const int* sizes, int threads) {{
  grid(sizes, threads, [=] {{ kernel(*static_cast<const Arguments*>(arguments)); }});
}}
extern "C" void launch(const void* arguments, const int* sizes, int threads) {{ launch_as({name}, arguments, sizes, threads); }}
"""


class Emulated(gpu.Kernel):
    """A kernel whose blocks run one after another here. Its GPU runs three of them at once."""

    def __call__(self, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        self.function.launch(ctypes.byref(arguments), (ctypes.c_int32 * 3)(*grid), self.threads)


class Emulator:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = lru_cache(maxsize=None)(self._kernel)

    def __call__(
        self,
        file: str,
        name: str,
        macros: Mapping[str, str],
        device: torch.device,
        threads: int = gpu.THREADS,
        shared: int = 0,
    ) -> gpu.Kernel:
        return self.kernel(file, name, tuple(sorted(macros.items())), threads, shared)

    def _kernel(
        self, file: str, name: str, macros: tuple[tuple[str, str], ...], threads: int, shared: int
    ) -> gpu.Kernel:
        written = self.folder / f"{name}{len(list(self.folder.iterdir()))}.cpp"
        defined = "\n".join(f"#define {key} {value}" for key, value in macros)
        written.write_text(SOURCE.format(macros=defined, file=gpu.FOLDER / file, name=name))
        built = written.with_suffix(".so")
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{gpu.FOLDER}", f"-I{HERE}"]
        options += os.environ.get("KVMOSAIC_EMULATOR_FLAGS", "").split()
        assert COMPILER is not None, "skipped without one"
        done = subprocess.run([COMPILER, *options, str(written), "-o", str(built)], capture_output=True, text=True)
        assert not done.returncode, done.stderr[:4000]
        return Emulated(ctypes.CDLL(str(built)), threads=threads, shared=shared, resident=3)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if COMPILER is None:
        pytest.skip("no C++ compiler to emulate a GPU with")
    return Emulator(tmp_path_factory.mktemp("emulated"))


def emulate(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on CPU tensors lie as on a GPU, and the CUDA kernels serve them."""
    monkeypatch.setattr(gpu, "kernel", emulator)
    monkeypatch.setattr(gpu, "why_not", lambda device: None)
    monkeypatch.setattr(lane, "layout_of", lambda device, looked_up: layout_of(torch.device("cuda"), looked_up))
    for kernels in (attention, encode):
        monkeypatch.setattr(kernels, "cpu", kernels.cuda)
