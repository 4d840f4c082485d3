"""Kernels inside compiled graphs: opaque operators, and a form in torch's own operators. Eager calls bypass it."""
