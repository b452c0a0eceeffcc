"""Quality metrics: those of the field, equal to the reference MATLAB toolbox, and measures of what the eye sees.

All take NumPy arrays or tensors and give one float64 value per image of a batch.
"""

from .detail import halo, laplacian_correlation, laplacian_energy, mottle
from .full import consistency, d_lambda, d_lambda_k, d_s, hqnr, qnr
from .reduced import ergas, psnr, q, q2n, sam, scc, ssim

__all__ = [
    "consistency",
    "d_lambda",
    "d_lambda_k",
    "d_s",
    "ergas",
    "halo",
    "hqnr",
    "laplacian_correlation",
    "laplacian_energy",
    "mottle",
    "psnr",
    "q",
    "q2n",
    "qnr",
    "sam",
    "scc",
    "ssim",
]
