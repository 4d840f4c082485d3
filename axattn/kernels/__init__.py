"""Triton kernels of our own, where no library has them. Imported where they are used; triton is optional."""
