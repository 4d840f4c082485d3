"""The axolotl plugin in the real axolotl, which is in the environment of ``make frameworks``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import installed

pytestmark = pytest.mark.nightly
pytest.importorskip("axolotl", reason="not in the project's environment; `make frameworks` installs it")

TRAIN = "import sys; from axolotl.cli.main import main; sys.argv[:] = ['axolotl', *sys.argv[1:]]; main()"
# a second plugin, which writes down what the first one does not return
RECORD = """
import json
import axattn
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback
class Record(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [Callback()]
class Callback(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        layers = [dict(layer.served) for layer in axattn.status(model).layers]
        open("record.json", "w").write(json.dumps({"losses": losses, "served": layers}))
"""


def train(environment: dict[str, str], model: Path, data: Path, folder: Path, **settings: Any) -> str:
    """What `axolotl train` prints: 20 steps on packed rows."""
    folder.mkdir()
    (folder / "record.py").write_text(RECORD)
    config = {
        "base_model": str(model), "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"),
        "datasets": [{"path": str(data / "train.jsonl"), "type": "completion", "ds_type": "json"}],
        "sequence_len": 128, "sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 20, "learning_rate": 1e-3, "optimizer": "adamw_torch", "logging_steps": 1, "seed": 0,
        "bf16": False, "fp16": False, "tf32": False, "use_cpu": True, "gradient_checkpointing": False,
        "dataset_num_proc": 1, "dataloader_num_workers": 0, "lr_scheduler": "constant", "save_strategy": "no",
        "special_tokens": {"pad_token": "<pad>"}, "torch_dtype": "float32", "plugins": ["record.Record"],
        **settings,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    off = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_DATASETS_OFFLINE": "1"}
    done = installed.run({**environment, **off}, "-c", TRAIN, "train", str(path), "--launcher", "python", cwd=folder)
    return done.stdout + done.stderr


LORA = {
    "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "learning_rate": 5e-3,
    "lora_qkv_kernel": True, "lora_o_kernel": True, "lora_mlp_kernel": False,  # Triton's, so not on a CPU
    "gradient_checkpointing": True,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_packed_training_has_the_losses_of_eager(
    environment: dict[str, str], model: Path, data: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """axolotl's own eager separates the documents of a row by their position ids."""
    train(environment, model, data, tmp_path / "eager", attn_implementation="eager", **more)
    printed = train(environment, model, data, tmp_path / "varlen", axattn="varlen", **more)
    eager, varlen = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("eager", "varlen"))
    assert "axattn: varlen: varlen runs 2 attention modules" in printed
    assert [list(served) for served in varlen["served"]] == [["varlen"]] * 2
    assert all(served["varlen"] >= 20 for served in varlen["served"])
    assert eager["served"] == []
    assert len(varlen["losses"]) == 20
    assert varlen["losses"] == pytest.approx(eager["losses"], abs=1e-3)
    assert varlen["losses"][-1] < varlen["losses"][0] - 0.1


def test_eager_with_axattns_checks(environment: dict[str, str], model: Path, data: Path, tmp_path: Path) -> None:
    """A name that no kernel of axattn runs trains, too: nothing is there to verify."""
    printed = train(environment, model, data, tmp_path / "run", axattn="eager", max_steps=2)
    assert "axattn: eager: Transformers' function, with axattn's checks" in printed
    assert len(json.loads((tmp_path / "run/record.json").read_text())["losses"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axattn": "varlen", "attn_implementation": "flex_attention"}, "both name the attention"),
        ({"axattn": "varlen", "context_parallel_size": 2}, "runs its own ring attention"),
        ({"axattn_on_unsupported": "route"}, "is set without `axattn:`"),
        ({"axattn": "fp8"}, "fp8 can't run on this machine"),
        ({"axattn": "varlen", "axattn_kernel_options": {"nonsense": 1}}, "varlen has no option 'nonsense'"),
    ],
)
def test_what_axattn_refuses_is_reported_by_axolotl(
    environment: dict[str, str], model: Path, data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        train(environment, model, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run/record.json").exists()
