"""Export: one graph for every length, made from a model as it is, and run at another length.

python examples/export.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import torch
from small import arguments

import axattn


@torch.no_grad()
def main(folder: str, name: str = "auto") -> float:
    """The largest difference between the graph and the model."""
    model = axattn.from_pretrained(folder, attn_implementation=name).eval()
    given = {"input_ids": torch.arange(3, 19)[None], "use_cache": False}
    shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes)
    longer = torch.arange(3, 43)[None]
    found = program.module()(input_ids=longer, use_cache=False).logits
    worst = float((found - model(longer, use_cache=False).logits).abs().max())
    print(f"exported with {given['input_ids'].shape[1]} tokens, run with {longer.shape[1]}: off by {worst:.4f}")
    assert worst < 1e-4
    return worst


if __name__ == "__main__":
    main(*arguments(__doc__))
