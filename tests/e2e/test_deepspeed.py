"""DeepSpeed's ZeRO over two processes on a CPU: the weights after a step are those of stock Transformers under it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run
from tests.models import build
from tests.parallel_jobs import compare, packed_batch

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install deepspeed (DS_BUILD_OPS=0 on a CPU)", allow_module_level=True)


def stepped(folder: str, stage: int, on_axattn: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of this rank and the weights after a step of SGD, on axattn or stock (which packs without a cache)."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import axattn

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    config["zero_allow_untested_optimizer"] = True
    keep = HfDeepSpeedConfig(config) if stage == 3 else None  # weights are split while they load
    batch: dict[str, Any] = packed_batch(1 + dist.get_rank())
    if on_axattn:
        model = axattn.from_pretrained(folder, attn_implementation="varlen")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    engine, *_ = deepspeed.initialize(
        model=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=config,
        dist_init_required=False,
    )
    loss = engine(**batch, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    assert keep is None or keep.is_zero3()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return float(loss.detach()), {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_under_zero_is_that_of_stock_transformers(stage: int, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    wanted = run(2, stepped, str(tmp_path), stage, False)
    for (loss, weights), (expected, theirs) in zip(run(2, stepped, str(tmp_path), stage, True), wanted, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert compare(weights, theirs) < 1e-5
