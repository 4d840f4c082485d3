"""Hub kernels without a hub: ``LOCAL_KERNELS`` points Transformers' own hub path at a kernel in plain Python.

Runs where the installed transformers takes the installed kernels; of the two that the tests run on that is the oldest
(transformers 5.23 wants kernels 0.18.2, which the registry does not have).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import axattn
from axattn import backends
from axattn.backends import hub, hub_records
from axattn.backends.hub import hub_backend
from axattn.errors import BackendUnavailableError, UnsupportedAttentionError
from axattn.machine import hub_cache
from axattn.machine.environment import Environment
from axattn.spec.names import HubPath
from tests.fakes import flash
from tests.models import alone, build, positions, tokens

FLASH = "kernels-community/flash-attn2"
MISSING = hub_backend(HubPath(FLASH, "v1")).probe(Environment.current())
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(reason.text for reason in MISSING))


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake of FlashAttention 2 as a hub kernel of two publishers."""
    entries = []
    for repository in (FLASH, "someone/flash"):
        folder = tmp_path / repository.replace("/", "-")
        variant = folder / "build" / "torch-cpu"
        variant.mkdir(parents=True)
        name = repository.split("/")[1]
        metadata = {
            "id": f"_{name}_{tmp_path.name}",
            "name": name,
            "version": 1,
            "license": "MIT",
            "python-depends": [],
        }
        (variant / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
        (variant / "__init__.py").write_text(
            "from tests.fakes import flash\n"
            "flash_attn_func = flash.FlashAttention2.flash_attn_func\n"
            "flash_attn_varlen_func = flash.FlashAttention2.flash_attn_varlen_func\n"
        )
        entries.append(f"{repository}={folder}")
    monkeypatch.setenv("LOCAL_KERNELS", os.pathsep.join(entries))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_cache, "is_offline", lambda: True)
    record = dataclasses.replace(hub_records.UNKNOWN, head_dim_multiple=8)  # the fake's: it trains on a CPU
    known = dataclasses.replace(hub_records.FLASH[FLASH], serves={"cpu": record})
    monkeypatch.setattr(hub, "FLASH", {**hub_records.FLASH, FLASH: known})
    backends.get.cache_clear()
    yield tmp_path
    backends.get.cache_clear()


def saved(folder: Path, family: str = "llama") -> Path:
    build(family).save_pretrained(folder / "model")
    return folder / "model"


def test_a_hub_kernel_runs_packed_rows_right(local: Path) -> None:
    ids, lengths = tokens(1, 12), (5, 7)
    with flash.sharp():
        flash.calls.clear()
        model = axattn.from_pretrained(saved(local), attn_implementation=f"{FLASH}@v1")
        assert model.config._attn_implementation == f"{FLASH}@v1"
        found = model(ids, position_ids=positions(lengths), use_cache=False).logits
        assert flash.calls
    assert torch.allclose(found, alone(build("llama"), ids, lengths), atol=1e-4)


def test_many_packed_rows_get_their_lengths(local: Path) -> None:
    ids, rows = tokens(2, 12), ((5, 7), (9, 3))
    with flash.sharp():
        model = axattn.from_pretrained(saved(local), attn_implementation=f"{FLASH}@v1")
        found = model(ids, position_ids=positions(*rows), use_cache=False).logits
    for row, lengths in enumerate(rows):
        assert torch.allclose(found[row], alone(build("llama"), ids[row : row + 1], lengths)[0], atol=1e-4)


def test_training_follows_eager(local: Path) -> None:
    reference, ids = build("llama"), tokens(2, 10)
    with flash.sharp():
        model = axattn.from_pretrained(saved(local), attn_implementation=f"{FLASH}@v1")
        for each in (model, reference):
            each.train()(ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4), name


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("someone/flash", "not a trusted publisher"),
        ("someone/flash@v1", "not a trusted publisher"),
    ],
)
def test_what_is_not_trusted_needs_permission(local: Path, path: str, reason: str) -> None:
    folder = saved(local)
    with pytest.raises(BackendUnavailableError, match=reason):
        axattn.from_pretrained(folder, attn_implementation=path)
    with flash.sharp():
        model = axattn.from_pretrained(folder, attn_implementation=path, allow_all_kernels=True)
        assert model(tokens(1, 8)).logits.isfinite().all()


def test_apply_and_restore(local: Path) -> None:
    model = build("llama")
    before = copy.copy(model.config._attn_implementation)
    with flash.sharp():
        axattn.apply(model, f"{FLASH}@v1")
        assert model(tokens(1, 8)).logits.isfinite().all()
    axattn.restore(model)
    assert model.config._attn_implementation == before
    assert model(tokens(1, 8)).logits.isfinite().all()


def test_a_repository_that_is_not_there_leaves_the_model_as_it_was(local: Path) -> None:
    model = build("llama")
    before = model.config._attn_implementation
    for _ in range(2):  # the second time as the first: no trace is left in Transformers' slot
        with pytest.raises(BackendUnavailableError, match="absent@v1 fails to load"):
            axattn.apply(model, "someone/absent@v1", allow_all_kernels=True)
    with pytest.raises(BackendUnavailableError, match="fails to load"):
        axattn.from_pretrained(saved(local), attn_implementation="someone/absent@v1", allow_all_kernels=True)
    assert model.config._attn_implementation == before
    assert not any("_axattn" in key for module in model.modules() for key in vars(module))
    assert model(tokens(1, 8)).logits.isfinite().all()


def test_a_layer_that_the_kernel_does_not_serve_is_refused_before_loading(local: Path) -> None:
    with pytest.raises(UnsupportedAttentionError, match="softcap"):
        axattn.from_pretrained(saved(local, "gemma2"), attn_implementation=f"{FLASH}@v1")


def test_the_fake_has_the_signature_that_transformers_reads() -> None:
    parameters = inspect.signature(flash.FlashAttention2.flash_attn_varlen_func).parameters
    assert {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "window_size"} <= set(parameters)
