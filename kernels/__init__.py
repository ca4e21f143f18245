"""Triton kernels and their launchers, without autograd, dispatch, or checks beyond asserts.

They import nothing of ltat_fast. This folder is installed as ``ltat_fast.kernels``. Its modules import Triton;
``ltat_fast.ops`` imports them on the first CUDA call.
"""
