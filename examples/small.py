"""What the examples train on, so that they run anywhere: tiny models and the docstrings of Python's library.

Run a script by its path, ``python examples/trainer.py``: Python then finds this file beside it.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def arguments(description: str | None, *, name: bool = True, make: Callable[[], str] | None = None) -> list[str]:
    """What the command line of an example gives its ``main``: a model's folder (`make` makes a tiny one if there is
    none), and the name of a kernel where `name` is true."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="MODEL_FOLDER", help="a model with its tokenizer")
    if name:
        parser.add_argument("name", nargs="?", metavar="NAME", default="auto", help="attn_implementation (auto)")
    given = parser.parse_args()
    return [given.folder or (make or small_model)(), *([given.name] if name else [])]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer."""
    special = ["<pad>", "</s>", "<mask>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("pad_token", "eos_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def saved(model: PreTrainedModel) -> str:
    """A folder with a model and a tokenizer."""
    folder = tempfile.mkdtemp(prefix="axattn-example-")
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def small_model() -> str:
    """A folder with a tiny LLaMA (random weights) and its tokenizer."""
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)))


def small_encoder() -> str:
    """The same with a tiny BERT, without dropout."""
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return saved(BertForMaskedLM(BertConfig(**SIZES, **quiet)))


def preferences() -> list[dict[str, str]]:
    """Prompts, each with an answer to prefer and one to avoid."""
    texts = [text for text in documents() if len(text) > 120]
    return [
        {"prompt": text[:64], "chosen": text[64 : 72 + i % 24], "rejected": text[96:64:-1]}
        for i, text in enumerate(texts)
    ]


def documents() -> list[str]:
    """A few dozen docstrings."""
    import collections
    import json
    import textwrap

    found = []
    for module in (collections, inspect, json, tempfile, textwrap):
        for _, member in inspect.getmembers(module, callable):
            text = inspect.getdoc(member)
            if text and len(text) > 40:
                found.append(text[:200])
    return found[:48]
