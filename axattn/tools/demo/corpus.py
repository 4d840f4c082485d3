"""Real text that is on every machine: the functions of Python's standard library, and a tokenizer for them."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 2048
END = "<|end|>"


def documents(limit: int = 3000, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Source of the standard library's documented functions and methods, in a fixed order.

    `progress` is called with the number found and `limit` after each file.
    """
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files of the library intentionally use other encodings
        lines = source.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                found.append(textwrap.dedent(_source_of(node, lines)))
        if progress is not None:
            progress(min(len(found), limit), limit)
        if len(found) >= limit:
            break
    return found[:limit]


def _source_of(node: ast.FunctionDef, lines: list[str]) -> str:
    """What `ast.get_source_segment` gives, indented; that one splits the whole file again for every function."""
    whole = lines[node.lineno - 1 : node.end_lineno]
    whole[-1] = whole[-1].encode()[: node.end_col_offset].decode()  # columns are counted in bytes
    return "\n".join(whole)


def train_tokenizer(texts: list[str]) -> Any:
    """A Transformers tokenizer: byte-level BPE with `VOCABULARY` entries, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def tokenise(texts: list[str], tokenizer: Any) -> list[dict[str, list[int]]]:
    """One example per document: ``input_ids`` that end with the end token."""
    end = tokenizer.eos_token_id
    return [{"input_ids": [*ids, end]} for ids in tokenizer(texts)["input_ids"]]
