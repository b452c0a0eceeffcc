"""Cosine schedule (Nichol and Dhariwal 2021) of the forward process x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Schedule:
    """Noise levels of T steps, counted from 0.

    Args:
        length: T.
        s: offset of the cosine.

    Attributes:
        betas, alphas_cumprod: [T], float64, on the CPU.
    """

    def __init__(self, length: int = 500, s: float = 0.008) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        self.length = length
        u = torch.arange(length + 1, dtype=torch.float64) / length
        f = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
        self.betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def factors(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) as float32 [B, 1, 1, 1] for time [B], on its device."""
        if time.device not in self._tables:  # copied once: a copy waits for the device
            both = (self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
            self._tables[time.device] = (both[0].float().to(time.device), both[1].float().to(time.device))
        signal, sigma = self._tables[time.device]
        return signal[time][:, None, None, None], sigma[time][:, None, None, None]

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t for x0 and noise [B, C, H, W] and time [B]."""
        signal, sigma = self.factors(time)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, time: Tensor, prediction: str) -> Tensor:
        """What a network of this kind of prediction (one of `options.PREDICTIONS`) is trained to give."""
        if prediction == "sample":
            return x0
        if prediction == "epsilon":
            return noise
        signal, sigma = self.factors(time)
        return signal * noise - sigma * x0

    def to_x0(self, output: Tensor, x: Tensor, time: Tensor, prediction: str) -> Tensor:
        """Estimate of x0 that a network's output for x_t stands for."""
        if prediction == "sample":
            return output
        signal, sigma = self.factors(time)
        if prediction == "epsilon":
            return (x - sigma * output) / signal
        return signal * x - sigma * output
