"""The Triton kernels compile as the launchers launch them: the interpreter takes much that the compiler does not.

Run as a program this file compiles instead of launching, for the compute capability given; it needs no GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a block may have: the least of GPUs with the instructions of 8.0 (8.6, 8.9), and of 9.0.
SHARED = {80: 99 << 10, 90: 227 << 10}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # triton reads it when it is imported: hence other processes
    command = [sys.executable, "-m", "tests.ops.test_triton_compile"]
    processes = [
        subprocess.Popen([*command, str(capability)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for capability in SHARED
    ]
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-4000:]


def main(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from pansharp_fast import kernels

    names = [path.stem for path in Path(kernels.__path__[0]).glob("[!_]*.py")]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    run = JITFunction.run

    class Driver:
        """What the compiler asks a GPU's driver for."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        shared = kernel.metadata.shared
        if shared > SHARED[capability]:
            raise RuntimeError(f"{self.__name__}: expected at most {SHARED[capability]} bytes, got {shared}: {options}")

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    # Tensors lie on the CPU. Now that the kernels are imported for the compiler, the variable only lets those through;
    # the launchers take them for a GPU's.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.Tensor.is_cuda = True
    torch.cuda.device_of = contextlib.nullcontext
    launch_cm3a()
    launch_wavelet()
    launch_frequency_attention()
    launch_norm()
    functions = [each for module in modules for each in vars(module).values() if isinstance(each, JITFunction)]
    missed = [each.__name__ for each in functions if each.hash is None]
    if missed:
        raise RuntimeError(f"kernels: expected all to be compiled, got none of {missed}")


def maps(
    count: int, *shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> list[torch.Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.zeros(shape, dtype=dtype).to(memory_format=layout).requires_grad_() for _ in range(count)]


def launch_cm3a() -> None:
    from pansharp_fast.ops import cm3a

    for dim, heads, window, learned, dtype, channels_last, tf32, side in (
        (64, 2, 3, True, torch.float32, False, False, 16),
        (12, 2, 5, True, torch.bfloat16, True, False, 16),
        (8, 2, 3, False, torch.float16, False, False, 16),
        (1, 1, 3, True, torch.float32, True, True, 1),
    ):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        tensors = maps(5, 1, heads * dim, side, side, dtype=dtype, channels_last=channels_last)
        factor = [torch.zeros(dim, window**2, window, window), torch.zeros(dim, window**2)] if learned else []
        outputs = cm3a(*tensors, *factor, num_heads=heads, window=window, backend="triton")
        torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), tensors)


def launch_wavelet() -> None:
    from pansharp_fast.kernels.wavelet import COVERED
    from pansharp_fast.ops import dwt2, iswt2, swt2

    def transform(dtype: torch.dtype, wavelet: str, mode: str, height: int, width: int) -> None:
        (x,) = maps(1, 3, height, width, dtype=dtype)
        coefficients = dwt2(x, wavelet, mode, stack=True, backend="triton")
        torch.autograd.grad(coefficients.sum(), x)

    for mode in COVERED[:-1]:
        dwt2(torch.zeros(3, 16, 16), "db2", mode, backend="triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        transform(dtype, "haar", "symmetric", 16, 16)
    for size in ((1, 1), (1, 16), (16, 1)):
        transform(torch.float32, "haar", "symmetric", *size)
    (x,) = maps(1, 3, 16, 16)
    iswt2(swt2(x, "haar", 2, backend="triton"), "haar", backend="triton")


def launch_frequency_attention() -> None:
    from pansharp_fast.ops import frequency_attention

    for dim, heads, dtype, channels_last, side in (
        (8, 2, torch.float32, False, 64),
        (64, 2, torch.bfloat16, True, 64),
        (1, 1, torch.float16, False, 1),
    ):
        tensors = maps(3, 1, heads * dim, side, side, dtype=dtype, channels_last=channels_last)
        out = frequency_attention(*tensors, num_heads=heads, backend="triton")
        torch.autograd.grad(out.sum(), tensors)


def launch_norm() -> None:
    from pansharp_fast.ops import OPERATORS, gated_sum, group_norm, join, layer_norm

    declaration = OPERATORS["norm"]
    assert declaration.samples is not None
    for sample in declaration.samples(torch.device("cpu"), torch.float32):
        sample.run(*sample.tensors, backend="triton")
    # As the networks call them: factors in a larger tensor, vectors in float32 under autocast.
    for dtype, channels, groups in ((torch.bfloat16, 128, 32), (torch.float16, 256, 32), (torch.bfloat16, 512, 1)):
        x = torch.zeros(1, channels, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        scale, shift = torch.zeros(1, 2 * channels, dtype=dtype).chunk(2, 1)
        for vector in (torch.zeros(channels), torch.zeros(channels, dtype=dtype)):
            options = {"offset": vector, "scale": scale, "shift": shift, "silu": True, "backend": "triton"}
            group_norm(x, groups, vector, vector, **options)
            layer_norm(x, vector, vector, **options)
            join(x, x[:, :8].float(), x[:, :1], one=True, channels=channels + 16, backend="triton")
            join(x, x, bias=vector, backend="triton")
            gated_sum(x, x, x, bias_a=vector, bias_b=vector, gate_a=scale, gate_b=shift, backend="triton")


if __name__ == "__main__":
    main(int(sys.argv[1]))
