"""Several kernels in one process: for a while, on a loaded model, and undone exactly.

python examples/several_kernels.py [MODEL_FOLDER]
"""

from __future__ import annotations

import torch
from small import arguments
from transformers import AutoModelForCausalLM

import axattn


@torch.no_grad()
def main(folder: str) -> float:
    """The largest difference between the kernels' logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = model.config._attn_implementation
    ids = torch.arange(2, 40)[None]
    logits = {before: model(ids).logits}
    for name in ("eager", "varlen", "auto"):
        with axattn.using(model, name):
            logits[name] = model(ids).logits
    axattn.apply(model, "varlen")
    print(axattn.plan(model, "auto"))
    axattn.restore(model)
    assert model.config._attn_implementation == before
    worst = max(float((found - logits["eager"]).abs().max()) for found in logits.values())
    print(f"{', '.join(logits)}: logits differ by at most {worst:.4f}")
    return worst


if __name__ == "__main__":
    main(*arguments(__doc__, name=False))
