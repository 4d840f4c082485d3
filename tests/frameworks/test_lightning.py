"""A Transformers model on an axattn name inside a LightningModule, which lightning trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import axattn

pytestmark = pytest.mark.nightly
lightning = pytest.importorskip("lightning", reason="not in the project's environment; `make frameworks` installs it")


def train(model: Path, folder: Path, name: str) -> list[float]:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tf.AutoModelForCausalLM.from_pretrained(model, attn_implementation=name)
            self.losses: list[float] = []

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    rows = torch.randint(2, 200, (20, 2, 48))
    module = Module()
    lightning.Trainer(
        max_steps=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=folder,
    ).fit(module, torch.utils.data.DataLoader(rows, batch_size=None))  # fmt: skip
    return module.losses


def test_lightning(model: Path, tmp_path: Path) -> None:
    axattn.register()
    found = {name: train(model, tmp_path, name) for name in ("varlen", "eager")}
    assert len(found["varlen"]) == 20
    assert found["varlen"] == pytest.approx(found["eager"], abs=1e-3)
