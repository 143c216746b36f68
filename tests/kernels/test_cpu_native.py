"""The compiled kernels by themselves: their memory under sanitizers, and on machines that are only emulated."""

import shutil
import subprocess
from pathlib import Path

import pytest

import kvmosaic.kernels

HARNESS = Path(__file__).with_name("random_stores.c")
SOURCES = Path(kvmosaic.kernels.__file__).parent
SANITIZE = ["-std=gnu11", "-O0", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_no_kernel_leaves_its_buffers(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    empty, program = tmp_path / "empty.c", tmp_path / "sanitize"
    empty.write_text("int main(void) { return 0; }")
    if subprocess.run([compiler, *SANITIZE, str(empty), "-o", str(program)], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    command = [compiler, *SANITIZE, f"-I{SOURCES}", str(HARNESS), "-o", str(program), "-lm", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_neon_agrees_with_plain_in_emulation(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    program = tmp_path / "neon"
    flags = ["-std=gnu11", "-O1", "-ffp-contract=off", "-w", "-static", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, str(HARNESS), "-o", str(program), "-lm", "-lpthread"], check=True)
    done = subprocess.run([emulator, "-cpu", "max", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
