"""Frameworks run from their own command lines, untouched, on an axattn name: nothing there imports axattn.

What is not in the project's environment (lm_eval, sentence-transformers) is in that of ``make frameworks``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import installed

pytestmark = pytest.mark.nightly

TRL = "import sys; from trl.cli import main; sys.argv[:] = ['trl', *sys.argv[1:]]; main()"  # what the script `trl` is


def losses(output: Path) -> list[float]:
    state = json.loads(sorted(output.glob("checkpoint-*/trainer_state.json"))[-1].read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def sft(environment: dict[str, str], model: Path, data: Path, output: Path, name: str, *launcher: str) -> list[float]:
    arguments = [
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)),
        *("--attn_implementation", name, "--max_steps", "20", "--logging_steps", "1", "--report_to", "none"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--max_length", "128", "--use_cpu", "true"),
        *("--bf16", "false", "--seed", "0", "--save_steps", "20", "--gradient_checkpointing", "false"),
        *("--dtype", "float32"),
    ]  # fmt: skip
    installed.run(environment, *launcher, *arguments, cwd=data)
    return losses(output)


def test_trl_sft(environment: dict[str, str], model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    found = {
        name: sft(environment, model, data, tmp_path / name, name, "-c", TRL, "sft") for name in ("varlen", "eager")
    }
    assert len(found["varlen"]) == 20
    assert found["varlen"] == pytest.approx(found["eager"], abs=1e-3)
    assert found["varlen"][-1] < found["varlen"][0]


def test_accelerate_launch(environment: dict[str, str], model: Path, data: Path, tmp_path: Path) -> None:
    """A script that knows nothing of axattn, in a child process of the launcher."""
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom trl.scripts.sft import main, make_parser\n"
        "script, training, model, mixture = make_parser().parse_args_and_config(sys.argv[1:])[:4]\n"
        "assert 'axattn' in sys.modules  # imported by torch\n"
        "main(script, training, model, mixture)\n"
    )
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(script))
    found = {name: sft(environment, model, data, tmp_path / name, name, *launcher) for name in ("varlen", "eager")}
    assert found["varlen"] == pytest.approx(found["eager"], abs=1e-3)


def test_lm_eval(environment: dict[str, str], model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="not in the project's environment; `make frameworks` installs it")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/docstrings.yaml").write_text(
        "task: docstrings\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data / 'train.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    found = {}
    for name in ("varlen", "eager"):
        arguments = f"pretrained={model},attn_implementation={name},dtype=float32"
        installed.run(
            environment,
            *("-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "docstrings", "--limit", "16"),
            *("--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--output_path", str(tmp_path / name)),
            cwd=tmp_path,
        )
        [results] = (tmp_path / name).rglob("results_*.json")
        found[name] = json.loads(results.read_text())["results"]["docstrings"]["bits_per_byte,none"]
    assert found["varlen"] == pytest.approx(found["eager"], abs=1e-3)


def test_sentence_transformers(environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="not in the project's environment; see `make frameworks`")
    code = f"""
import sys, torch
from sentence_transformers import SentenceTransformer, models
texts = ["short", "a text that is longer than the other"]
def embed(name):
    word = models.Transformer({str(model)!r}, model_kwargs={{"attn_implementation": name}})
    assert word.auto_model.config._attn_implementation == name
    made = SentenceTransformer(modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu")
    return torch.tensor(made.encode(texts))
print((embed("varlen") - embed("eager")).abs().max().item())
"""
    assert float(installed.run(environment, "-c", code, cwd=tmp_path).stdout.split()[-1]) < 1e-3
