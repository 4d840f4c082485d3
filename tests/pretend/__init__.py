"""Two GPUs pretended on a CPU: what no GPU has run yet shows here whether its tensors are where they have to be.

Tensors say that they are on ``cuda:0`` or ``cuda:1``, compute on the CPU, and refuse to be mixed; backward runs in a
thread of each device, as on a GPU. Kernels are stand-ins (`tests.fakes`), as strict as elsewhere. torch must learn of
the devices before it is imported, so these tests have a process of their own: ``make pretend``, or
``pytest -p tests.pretend.plugin tests/pretend``.
"""
