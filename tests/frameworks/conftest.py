"""A tiny model, its tokenizer and a data set on disk, and the environment of a process in which axattn is installed."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as tf

from tests import installed


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**installed.install(tmp_path_factory.mktemp("site")), "CUDA_VISIBLE_DEVICES": "", "WANDB_DISABLED": "true"}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Docstrings of the standard library: text that ships with Python."""
    trees = [ast.parse(Path(module.__file__ or "").read_text()) for module in (json, functools, subprocess, re, ast)]
    nodes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    found = sorted({" ".join((ast.get_docstring(node) or "").split()) for node in nodes})
    return [text[:200] for text in found if len(text) > 60][:64]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A seeded tiny Llama and a tokenizer trained on `texts`, saved."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("model")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        initializer_range=0.2,  # at 0.02 a leak between documents changes a loss by less than 1e-3, at 0.2 by 0.05
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder
