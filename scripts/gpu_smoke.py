"""Every CUDA kernel once on tiny shapes, forward and backward: what compute-sanitizer watches."""

import importlib.util

import torch

import pansharp_fast
from pansharp_fast import ops

assert torch.cuda.is_available(), "expected a CUDA device"


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def cm3a(dtype: torch.dtype) -> None:
    for window in (3, 5):
        for learned in (True, False):
            for layout in (torch.contiguous_format, torch.channels_last):
                count = window**2
                tensors = [leaf(2, 16, 19, 37, dtype=dtype).contiguous(memory_format=layout) for _ in range(5)]
                factor = (leaf(8, count, window, window), leaf(8, count)) if learned else (None, None)
                out = ops.cm3a(*tensors, *factor, num_heads=2, window=window)
                (out[0].square().sum() + out[1].sum()).backward()


def wavelet() -> None:
    x = leaf(2, 3, 33, 65)
    for name in ("haar", "db4"):
        approximation, details = ops.dwt2(x, name)
        ops.idwt2((approximation, details), name).square().sum().backward()
    y = leaf(1, 2, 32, 64)
    ops.iswt2(ops.swt2(y, "haar", 1), "haar").square().sum().backward()


def frequency_attention() -> None:
    q, k, v = (leaf(1, 16, 17, 20) for _ in range(3))
    ops.frequency_attention(q, k, v, num_heads=2).square().sum().backward()


with pansharp_fast.use_backend("cuda"):
    cm3a(torch.float32)
    cm3a(torch.bfloat16)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    cm3a(torch.float32)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    frequency_attention()
    if importlib.util.find_spec("pywt") is not None:
        wavelet()
    else:
        print("wavelet: skipped, PyWavelets is not installed")
torch.cuda.synchronize()
print("done")
