"""Kernels for NVIDIA GPUs, in Triton, each beside what it computes in plain torch.

Triton is imported where a kernel runs, and not before: torch for CPUs comes without it.
"""
