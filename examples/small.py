"""What the examples train on, so that they run anywhere: a tiny LLaMA and the docstrings of Python's library.

Run a script by its path, ``python examples/trainer.py``: Python then finds this file beside it.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def arguments(description: str | None, *, name: bool = True) -> list[str]:
    """What the command line of an example gives its ``main``: a model's folder (a tiny one is made if there is none),
    and the name of a kernel where `name` is true."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="MODEL_FOLDER", help="a causal language model with its tokenizer")
    if name:
        parser.add_argument("name", nargs="?", metavar="NAME", default="auto", help="attn_implementation (auto)")
    given = parser.parse_args()
    return [given.folder or small_model(), *([given.name] if name else [])]


def small_model() -> str:
    """A folder with a tiny LLaMA (random weights) and a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["<pad>", "</s>", *alphabet])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    folder = tempfile.mkdtemp(prefix="axattn-example-")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
