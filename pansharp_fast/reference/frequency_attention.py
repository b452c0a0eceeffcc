"""Frequency-selective channel attention (U-Know-DiffPAN, arXiv 2412.06243; amplitude and phase as released).

With X = rfft2(x) (orthonormal; the half spectrum as it stands, no column counted twice), per head of D channels:

    A = softmax_j(scale Σ_f |Q_i(f)| |K_j(f)|),    P = softmax_j(scale Σ_f ∠Q_i(f) ∠K_j(f)),
    out_i = irfft2( Σ_j A_ij |V_j| · exp(i Σ_j P_ij ∠V_j) ).
"""

from __future__ import annotations

import torch
from torch import Tensor


def self_conjugate(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Mask [H, W//2 + 1], True at the (at most four) frequencies where the spectrum of a real map is real."""
    rows = torch.arange(height, device=device)
    columns = torch.arange(width // 2 + 1, device=device)
    return ((2 * rows % height) == 0)[:, None] & ((2 * columns % width) == 0)[None, :]


def polar(spectrum: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitude and phase in (-π, π] of a complex half spectrum.

    Where the mask `real` is set the imaginary rounding noise is dropped: it would turn +π into -π at random. Values
    whose squares are below the smallest normal number count as 0; the phase of 0 is 0 and its gradient is 0.
    """
    imaginary = torch.where(real, 0.0, spectrum.imag) + 0.0  # adding 0 turns -0 into +0
    exact = torch.complex(spectrum.real, imaginary)
    negligible = exact.detach().abs() < torch.finfo(imaginary.dtype).tiny ** 0.5
    exact = torch.where(negligible, 0.0, exact)
    return exact.abs(), torch.where(negligible, 0.0, exact.angle())


def frequency_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, scale: float | None = None, normalize: bool = True
) -> Tensor:
    """See `pansharp_fast.ops.frequency_attention`, whose arguments these are."""
    batch, channels, height, width = q.shape
    if batch == 0:
        return (q + k + v).contiguous()  # torch has no FFT of nothing
    depth = channels // num_heads
    scale = depth**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    real = self_conjugate(height, width, q.device)
    amplitudes, phases = [], []
    for x in (q, k, v):
        x = x.to(dtype)
        if normalize:
            x = torch.nn.functional.normalize(x, dim=1)
        spectrum = torch.fft.rfft2(x, norm="ortho")
        amplitude, phase = polar(spectrum, real)
        amplitudes.append(amplitude.reshape(batch, num_heads, depth, -1))
        phases.append(phase.reshape(batch, num_heads, depth, -1))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = torch.softmax(scale * (query @ key.transpose(-1, -2)), dim=-1)
        return (attention @ value).reshape(batch, channels, height, width // 2 + 1)

    joined = torch.polar(attend(*amplitudes), attend(*phases))
    return torch.fft.irfft2(joined, s=(height, width), norm="ortho").to(q.dtype)
