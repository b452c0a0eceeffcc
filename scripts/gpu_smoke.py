"""Every CUDA kernel once on tiny shapes, forward and backward: what compute-sanitizer watches."""

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
                # 17 channels a head: three rounds of eight, the last one incomplete.
                tensors = [leaf(1, 34, 19, 37, dtype=dtype).contiguous(memory_format=layout) for _ in range(5)]
                factor = (leaf(17, count, window, window), leaf(17, count)) if learned else (None, None)
                out = ops.cm3a(*tensors, *factor, num_heads=2, window=window)
                (out[0].square().sum() + out[1].sum()).backward()


def wavelet() -> None:
    for size in ((33, 65), (32, 64)):  # the second one has paths of its own for two taps
        x = leaf(2, 3, *size)
        for name in ("haar", "db2", "db4"):
            approximation, details = ops.dwt2(x, name)
            ops.idwt2((approximation, details), name).square().sum().backward()
    y = leaf(1, 2, 32, 64)
    ops.iswt2(ops.swt2(y, "haar", 1), "haar").square().sum().backward()


def frequency_attention() -> None:
    for channels, heads, size in ((16, 2, (17, 20)), (48, 1, (17, 20)), (128, 2, (9, 8))):
        q, k, v = (leaf(1, channels, *size) for _ in range(3))
        ops.frequency_attention(q, k, v, num_heads=heads).square().sum().backward()


with pansharp_fast.use_backend("cuda"):
    cm3a(torch.float32)
    cm3a(torch.bfloat16)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    cm3a(torch.float32)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    frequency_attention()
    wavelet()
torch.cuda.synchronize()
print("done")
