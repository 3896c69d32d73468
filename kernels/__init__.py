"""Triton kernels. Importing this package loads no Triton: each module does, on first use."""
