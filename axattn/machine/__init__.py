"""Describes a machine: GPUs, libraries, the hub cache. Kernels are chosen in `axattn.planning`."""
