"""Frequency-selective channel attention: two channel attentions, on amplitudes and on phases of the spectrum."""

from __future__ import annotations

from torch import Tensor

from ..reference import frequency_attention as reference
from . import _backends
from ._backends import FLOATING, Operator, Support


def frequency_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Channel attention in the Fourier domain, separately on amplitudes and phases (U-Know-DiffPAN's FTCA as released).

    With X = rfft2(x) (orthonormal) and per head of D = C / num_heads channels, sums running over the half spectrum:
    A = softmax_j(scale Σ_f |Q_i||K_j|), P = softmax_j(scale Σ_f ∠Q_i ∠K_j),
    out_i = irfft2(Σ_j A_ij |V_j| · exp(i Σ_j P_ij ∠V_j)).

    Phases lie in (-π, π]; ∠0 is 0 with gradient 0. At the at most four frequencies where the spectrum of a real map is
    real the phase is exactly 0 or π. float16 and bfloat16 are transformed and attended in float32.

    Args:
        q, k, v: [B, C, H, W], any H and W >= 1, any strides; float32, float64, bfloat16 or float16.
        num_heads: divides C; head h holds channels h·D to (h+1)·D - 1.
        scale: factor of the logits; None is D^-0.5.
        normalize: divide each pixel's C values by their L2 norm (at least 1e-12) before the transform.
        backend: see `pansharp_fast.ops.select`.

    Returns:
        [B, C, H, W], contiguous, dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; H or W is 0; `num_heads` does not divide C.
        BackendError: the backend asked for cannot run the call.
    """
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: expected a floating-point tensor [B, C, H, W], got {q.dtype} {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            expected = f"{q.dtype} {list(q.shape)} on {q.device} as q"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    if q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"q: expected height and width of at least 1, got {list(q.shape)}")
    if num_heads < 1 or q.shape[1] % num_heads or q.shape[1] == 0:
        raise ValueError(f"num_heads: expected a divisor of C = {q.shape[1]}, got {num_heads}")
    _backends.select(OPERATOR, (q, k, v), backend)
    return reference(q, k, v, num_heads=num_heads, scale=scale, normalize=normalize)


OPERATOR = _backends.register(
    Operator("frequency_attention", {"reference": Support(("cpu", "cuda", "xpu", "mps"), FLOATING)})
)
