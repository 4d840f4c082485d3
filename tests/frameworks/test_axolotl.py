"""The axolotl plugin in the real axolotl, which is in the environment of ``make frameworks``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import installed

pytestmark = pytest.mark.nightly
pytest.importorskip("axolotl", reason="not in the project's environment; `make frameworks` installs it")

TRAIN = "import sys; from axolotl.cli.main import main; sys.argv[:] = ['axolotl', *sys.argv[1:]]; main()"


def train(environment: dict[str, str], model: Path, data: Path, folder: Path, **settings: Any) -> str:
    """What `axolotl train` prints: 20 steps on packed rows."""
    folder.mkdir()
    config = {
        "base_model": str(model), "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"),
        "datasets": [{"path": str(data / "train.jsonl"), "type": "completion", "ds_type": "json"}],
        "sequence_len": 128, "sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 20, "learning_rate": 1e-3, "optimizer": "adamw_torch", "logging_steps": 1, "seed": 0,
        "bf16": False, "fp16": False, "tf32": False, "use_cpu": True, "gradient_checkpointing": False,
        "dataset_num_proc": 1, "dataloader_num_workers": 0, "lr_scheduler": "constant", "save_strategy": "no",
        "special_tokens": {"pad_token": "<pad>"}, "dataset_processes": 1, "torch_dtype": "float32",
        **settings,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    off = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_DATASETS_OFFLINE": "1"}
    done = installed.run({**environment, **off}, "-c", TRAIN, "train", str(path), "--launcher", "python", cwd=folder)
    return done.stdout + done.stderr


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"'loss': '?([0-9.]+)", printed)]


@pytest.mark.parametrize("lora", [False, True])
def test_packed_training_has_the_losses_of_eager(
    environment: dict[str, str], model: Path, data: Path, tmp_path: Path, lora: bool
) -> None:
    more = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True} if lora else {}
    found = {
        name: losses(train(environment, model, data, tmp_path / name, axattn=name, **more))
        for name in ("varlen", "eager")
    }
    assert len(found["varlen"]) == 20
    assert found["varlen"] == pytest.approx(found["eager"], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axattn": "varlen", "attn_implementation": "flex_attention"}, "both name the attention"),
        ({"axattn": "varlen", "context_parallel_size": 2}, "runs its own ring attention"),
        ({"axattn_on_unsupported": "route"}, "is set without `axattn:`"),
        ({"axattn": "fp8"}, "fp8 can't run on this machine"),
        ({"axattn": "varlen", "axattn_kernel_options": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_what_axattn_refuses_is_said_by_axolotl(
    environment: dict[str, str], model: Path, data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        train(environment, model, data, tmp_path / "run", **settings)
