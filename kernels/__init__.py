"""Triton kernels, one file per operator."""
