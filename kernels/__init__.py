"""Triton kernels and their launchers: no autograd, no dispatch, no validation beyond asserts, nothing of ltat_fast.

Installed as ``ltat_fast.kernels``. A module here needs Triton to import; ``ltat_fast.ops`` imports it on the first
CUDA call.
"""
