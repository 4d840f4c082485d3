"""``examples/ms_swift.py`` in the real ms-swift: its packing check allows axattn's names, and still refuses others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import installed

pytestmark = pytest.mark.nightly
pytest.importorskip("swift", reason="not in the project's environment; `make frameworks` installs it")


def test_the_packing_check_allows_axattns_names(environment: dict[str, str], tmp_path: Path) -> None:
    code = f"""
import runpy
from swift.arguments import SftArguments
before = SftArguments._check_padding_free
runpy.run_path({str(installed.ROOT / "examples/ms_swift.py")!r})
def ask(name, packing=True):
    one = SftArguments.__new__(SftArguments)
    one.attn_impl, one.packing, one.padding_free = name, packing, False
    try:
        one._check_padding_free()
    except ValueError:
        return 'refused'
    return one.padding_free
said = (ask('varlen'), ask('flash_attention_2'), ask('sdpa'), ask('varlen', False))
print(*said, SftArguments._check_padding_free is before)
"""
    done = installed.run(environment, "-c", code, cwd=tmp_path)
    assert done.stdout.split()[-5:] == ["True", "True", "refused", "False", "False"]


PLUGIN = installed.ROOT / "examples/ms_swift.py"
SFT = "import sys; from swift.cli.main import cli_main; sys.argv[:] = ['swift', *sys.argv[1:]]; cli_main()"
RECORD = """
import json
import axattn
import transformers.trainer
class Record(transformers.TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        layers = [dict(layer.served) for layer in axattn.status(model).layers]
        open("record.json", "w").write(json.dumps({"losses": losses, "served": layers}))
transformers.trainer.DEFAULT_CALLBACKS.append(Record)
"""
ALLOW_EAGER = """
from swift.arguments import SftArguments
def allow(self):
    self.padding_free = self.padding_free or self.packing
SftArguments._check_padding_free = allow
"""


def sft(environment: dict[str, str], model: Path, folder: Path, name: str, *more: str) -> dict[str, list[object]]:
    """Losses and served kernels of 20 steps of `swift sft`."""
    (folder / "record.py").write_text(RECORD)
    arguments = [
        *("--model", str(model), "--model_type", "llama", "--template", "dummy", "--dataset", "train.jsonl"),
        *("--attn_impl", name, "--output_dir", "out", "--max_steps", "20", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"),
        *("--max_length", "128", "--torch_dtype", "float32", "--bf16", "false", "--fp16", "false", "--seed", "0"),
        *("--tuner_type", "full", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--report_to", "none"),
        *("--split_dataset_ratio", "0", "--dataset_num_proc", "1", "--dataloader_num_workers", "0"),
        *("--save_strategy", "no", "--use_hf", "true", *more),
    ]  # fmt: skip
    installed.run({**environment, "HF_DATASETS_OFFLINE": "1"}, "-c", SFT, "sft", *arguments, cwd=folder)
    record: dict[str, list[object]] = json.loads((folder / "record.json").read_text())
    return record


@pytest.mark.parametrize("packing", [False, True])
def test_sft_has_the_losses_of_eager(
    environment: dict[str, str], model: Path, texts: list[str], tmp_path: Path, packing: bool
) -> None:
    """Eager is allowed to pack for the comparison: Transformers separates the documents by their position ids."""
    roles = ({"role": "user", "content": "Go on."}, {"role": "assistant"})
    rows = [{"messages": [roles[0], {**roles[1], "content": text}]} for text in texts]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "allow.py").write_text(ALLOW_EAGER)
    more = {"varlen": [str(PLUGIN)], "eager": ["allow.py"]} if packing else {"varlen": [], "eager": []}
    found = {
        name: sft(
            environment, model, tmp_path, name, "--packing", str(packing).lower(),
            "--external_plugins", "record.py", *plugins,
        )
        for name, plugins in more.items()
    }  # fmt: skip
    assert [list(served) for served in found["varlen"]["served"]] == [["varlen"]] * 2
    assert found["eager"]["served"] == []
    varlen, eager = found["varlen"]["losses"], found["eager"]["losses"]
    assert len(varlen) == 20
    assert varlen == pytest.approx(eager, abs=1e-3)
    assert varlen[-1] < varlen[0] - 0.1


def test_without_the_plugin_ms_swift_refuses_to_pack(
    environment: dict[str, str], model: Path, texts: list[str], tmp_path: Path
) -> None:
    """Once this fails, the plugin is not needed any more."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": texts[0]}]}))
    with pytest.raises(AssertionError, match="requires a flash attention implementation"):
        sft(environment, model, tmp_path, "varlen", "--packing", "true", "--external_plugins", "record.py")
