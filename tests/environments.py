"""Machines to inject: every kind of machine can be tested on any machine."""

from __future__ import annotations

from axattn.machine.environment import Environment

LIBRARIES = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "flash_attn": "2.8.3",
    "flash_attn_3": "3.0.0",
    "flash_attn_4": "4.0.0b36",
    "nvidia_cutlass_dsl": "4.7.1",
    "quack_kernels": "0.6.5",
    "xformers": "0.0.35",
    "cuda_runtime_12": "12.8.90",
    "cuda_runtime_13": "13.0.96",
    "sageattention": "1.0.6",
    "triton": "3.7.1",
    "torchao": "0.18.0",
    "kernels": "0.18.3",
}


def machine(
    device: str = "cpu", sm: int | None = None, rocm: str | None = None, **libraries: str | None
) -> Environment:
    """A machine with every library; give a version to change one, None to take it away."""
    found = {k: v for k, v in {**LIBRARIES, **libraries}.items() if v is not None}
    architecture = None if sm is None else divmod(sm, 10)
    return Environment(
        device=device,
        architecture=architecture,
        gpu=None if device == "cpu" else f"Test {device.upper()}",
        gpus=0 if device == "cpu" else 1,
        cuda="13.0" if device == "cuda" else None,
        rocm=rocm,
        libraries=found,
    )


CPU = machine()
TURING = machine("cuda", 75)
AMPERE = machine("cuda", 80)
ADA = machine("cuda", 89)
HOPPER = machine("cuda", 90)
BLACKWELL = machine("cuda", 100)
ROCM5 = machine("rocm", rocm="5.7")
ROCM6 = machine("rocm", rocm="6.2")
NPU = machine("npu")
