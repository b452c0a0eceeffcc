"""Quality metrics of the field, equal to the reference MATLAB toolbox: one float64 value per image of a batch."""

from .full import d_lambda, d_lambda_k, d_s, hqnr, qnr
from .reduced import ergas, psnr, q, q2n, sam, scc, ssim

__all__ = ["d_lambda", "d_lambda_k", "d_s", "ergas", "hqnr", "psnr", "q", "q2n", "qnr", "sam", "scc", "ssim"]
