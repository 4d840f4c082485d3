"""The folder that `make hub-kernel` makes: complete, made of today's sources, the same numbers as axattn's operator.

In Transformers: tests/e2e/test_hub_kernel.py.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hub_kernel import make
from tests.interpreter import INTERPRETED

VARIANTS = ("torch-cpu", "torch-cuda", "torch-universal")
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.make(tmp_path_factory.mktemp("hub-kernel"))


def load(variant: Path, suffix: str = "") -> ModuleType:
    """The package of a variant, as kernels loads it: under its id."""
    name = json.loads((variant / "metadata.json").read_text())["id"] + suffix
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield load(folder / "build" / "torch-cpu")


# ---- the folder ------------------------------------------------------------------------------------------------------


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """The level and the name of every module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_needs_torch_and_triton_only(folder: Path, variant: str) -> None:
    modules = list((folder / "build" / variant).rglob("*.py"))
    assert len(modules) > 8
    for path in modules:
        for level, name in imported(path):
            if level:
                assert level == 1, path
                assert path.with_name(f"{name}.py").exists(), (path, name)
            else:
                top = name.partition(".")[0]
                assert top in {"torch", "triton"} or top in sys.stdlib_module_names, (path, name)


def code(tree: ast.AST) -> str:
    """The code of a module or definition without imports and module docstring."""
    body = [n for n in getattr(tree, "body", []) if not isinstance(n, ast.Import | ast.ImportFrom)]
    return "\n".join(ast.dump(n) for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)))


@pytest.mark.parametrize("taken", make.TAKEN, ids=lambda taken: taken.module)
def test_the_copies_are_the_code_of_axattn(folder: Path, taken: make.Taken) -> None:
    source = ast.parse((make.ROOT / f"{taken.module.replace('.', '/')}.py").read_text())
    path = folder / "build" / "torch-cuda" / f"{taken.module.rpartition('.')[2]}.py"
    if taken.only:
        source.body = [n for n in source.body if getattr(n, "name", "") in taken.only]
        assert len(source.body) == len(taken.only)
    wanted = code(source).replace(
        ast.dump(ast.Constant("axattn::int8_attention")),
        ast.dump(ast.parse('add_op_namespace_prefix("int8_attention")', mode="eval").body),
    )
    assert code(ast.parse(path.read_text())) == wanted


def test_it_is_made_again_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    def texts(of: Path) -> dict[str, str]:
        return {
            str(path.relative_to(of)): path.read_text()
            for path in sorted(of.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }

    first = make.make(tmp_path)
    (first / "build" / "torch-cuda" / "left_over.py").write_text("")
    assert texts(make.make(tmp_path)) == texts(folder)


def test_metadata_are_those_of_each_variant(folder: Path) -> None:
    found = {name: json.loads((folder / "build" / name / "metadata.json").read_text()) for name in VARIANTS}
    assert {path.name for path in (folder / "build").iterdir()} == set(VARIANTS)
    assert len({metadata["id"] for metadata in found.values()}) == len(VARIANTS)
    for name, metadata in found.items():
        assert metadata["id"].isidentifier()
        assert metadata["name"].replace("-", "_") == "int8_flash_attn"
        assert metadata["version"] == 1, "Transformers asks for v1 where no revision is given"
        assert "flash" in metadata["name"], "by the name Transformers knows what needs a model that supports flash"
        assert metadata["backend"]["type"] == ("cpu" if name == "torch-cpu" else "cuda")
        here = {
            path.relative_to(folder / "build" / name).as_posix() for path in (folder / "build" / name).rglob("*.py")
        }
        assert set(metadata["digest"]["files"]) == here


def test_kernels_reads_metadata_digest_and_build_toml(folder: Path) -> None:
    pytest.importorskip("kernels", reason="kernels is not installed")
    inside = "kernels._rust" if importlib.util.find_spec("kernels._rust") else "kernels_data"  # before 0.17
    rust = importlib.import_module(inside)
    for name in VARIANTS:
        variant = folder / "build" / name
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
    if hasattr(rust, "Build"):
        rust.Build.open(folder)


def test_the_maker_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers, internals, *others = make.TAKEN
    monkeypatch.setattr(make, "TAKEN", (internals, *others))
    with pytest.raises(ValueError, match=r"no copy of axattn\.hf\.transfers"):
        make.sources()
    for wrong, said in (
        (internals._replace(only=("flash_sideways",)), "has no"),
        (internals._replace(only=("calls_around",)), "_CALL.*used and not taken"),
        (transfers._replace(replaced=(("torch", "jax"),)), "times, not once"),
    ):
        with pytest.raises(ValueError, match=said):
            make.copied(wrong)


# ---- what it computes ------------------------------------------------------------------------------------------------


def made(*lengths: int, dim: int = 16, heads: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (heads, heads // 2, heads // 2)
    return [torch.randn(sum(lengths), h, dim, generator=generator).to(dtype).requires_grad_() for h in sizes]


def ends(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def exact(q: Any, k: Any, v: Any, lengths: tuple[int, ...], causal: bool, window: int | None) -> torch.Tensor:
    """Attention document by document."""
    outs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
        if causal:
            seen = seen.tril()
        if window is not None:
            seen = (
                seen & seen.new_ones(length, length).tril(window - 1) & seen.new_ones(length, length).triu(1 - window)
            )
        heads = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        start += length
    return torch.cat(outs)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.nightly
@needs_interpreter
@pytest.mark.parametrize(
    ("causal", "window", "given"),
    [(True, None, (-1, -1)), (True, 5, (4, 4)), (False, None, (-1, -1)), (False, 5, (4, 4))],
)
def test_output_and_gradients(kernel: Any, causal: bool, window: int | None, given: tuple[int, int]) -> None:
    lengths = (9, 1, 14)
    inputs = made(*lengths)
    out = kernel.flash_attn_varlen_func(*inputs, ends(*lengths), ends(*lengths), causal=causal, window_size=given)
    wanted = exact(*inputs, lengths, causal, window)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    assert 0 < relative(out, wanted) < 0.015
    found, truth = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, wanted))
    assert all(0 < relative(a, b) < 0.02 for a, b in zip(found, truth, strict=True))


@needs_interpreter
def test_it_is_axattns_operator_bit_for_bit(kernel: Any) -> None:
    from axattn.backends import int8_operator
    from axattn.backends.varlen_engine.flash_backward import Packed
    from axattn.kernels.document_statistics import Documents
    from axattn.kernels.int8_attention import query_blocks

    lengths = (9, 14)
    q, k, v = (x.detach() for x in made(*lengths))
    packed = Packed(ends(*lengths), ends(*lengths), 14, 14, True, None, 0.25)
    blocks = query_blocks(lengths, int8_operator.block_of(q), q.device)
    wanted = int8_operator.attention(q, k, v, packed, blocks, Documents(lengths, q.device), 0.0, False)[0]
    assert torch.equal(kernel.flash_attn_varlen_func(q, k, v, packed.cu_q, packed.cu_k, causal=True), wanted)


@pytest.mark.nightly
@needs_interpreter
def test_whole_rows_and_single_queries(kernel: Any) -> None:
    q, k, v = (x.detach().unflatten(0, (2, 6)) for x in made(12))
    out = kernel.flash_attn_func(q, k, v, causal=True)
    assert relative(out.flatten(0, 1), exact(*(x.flatten(0, 1) for x in (q, k, v)), (6, 6), True, None)) < 0.015
    last = kernel.flash_attn_func(q[:, -1:], k, v, causal=True)  # the last query sits at the last key
    rows = exact(*(x.flatten(0, 1) for x in (q, k, v)), (6, 6), True, None).unflatten(0, (2, 6))
    assert torch.allclose(last, rows[:, -1:], atol=1e-6)  # exact


@pytest.mark.nightly
@needs_interpreter
def test_documents_without_tokens_and_queries_without_keys(kernel: Any) -> None:
    q, k, v = made(9)
    lengths = ends(4, 0, 5)
    whole = kernel.flash_attn_varlen_func(q, k, v, ends(4, 5), ends(4, 5), causal=True)
    assert torch.equal(kernel.flash_attn_varlen_func(q, k, v, lengths, lengths, causal=True), whole)
    for of_q, of_k in (((4, 5), (0, 9)), ((4, 5), (9, 0)), ((9,), (5,))):
        n = sum(of_k)
        out = kernel.flash_attn_varlen_func(q, k[:n], v[:n], ends(*of_q), ends(*of_k), causal=True)
        assert torch.isfinite(out).all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        nobody = slice(4, 9) if of_k == (9, 0) else slice(0, 4)  # those without a key
        assert not out[nobody].any()
        assert out[0 if of_k == (9, 0) else 4 :][:4].any(-1).all()
    none = kernel.flash_attn_varlen_func(q, k[:0], v[:0], ends(9), ends(0))
    assert torch.equal(none, torch.zeros_like(none))
    assert kernel.flash_attn_varlen_func(q[:0], k[:0], v[:0], ends(0), ends(0)).shape == (0, 4, 16)


# ---- what it refuses -------------------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dropout_p": 0.1}, r"dropout_p=0\.1"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"alibi_slopes": torch.zeros(4)}, "alibi"),
        ({"block_table": torch.zeros(1, 1)}, "paged"),
        ({"return_attn_probs": True}, "return_attn_probs"),
        ({"softcap": 5.0}, "softcap=5.0 with a gradient"),
        ({"deterministic": True}, "use_deterministic_algorithms"),
        ({"causal": False, "window_size": (3, 0)}, "symmetric"),
        ({"dropout_p": 0.1, "s_aux": torch.zeros(4)}, r"dropout_p=0\.1.*; s_aux"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_it_does_not_serve_is_refused(kernel: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        kernel.flash_attn_varlen_func(*made(9), ends(9), ends(9), **{"causal": True, **options})


@needs_interpreter
def test_shapes_dtypes_and_lengths_are_checked(kernel: Any) -> None:
    q, k, v = made(9)
    call = kernel.flash_attn_varlen_func
    for given, error, said in (
        ((*made(9, dim=12), ends(9), ends(9)), NotImplementedError, "head_dim=12"),
        ((*made(9, dim=264), ends(9), ends(9)), NotImplementedError, "head_dim=264"),
        ((*made(9, dtype=torch.float64), ends(9), ends(9)), NotImplementedError, "float64"),
        ((*made(9, dtype=torch.bfloat16), ends(9), ends(9)), NotImplementedError, "multiplies the bits"),
        ((q, k.half(), v, ends(9), ends(9)), ValueError, "one dtype"),
        ((q, k[..., :8], v, ends(9), ends(9)), ValueError, r"\[tokens, H, D\]"),
        ((q[:, :3], k, v, ends(9), ends(9)), ValueError, "multiple"),
        ((q, k, v, ends(8), ends(9)), ValueError, "cu_seqlens_q must rise from 0 to the 9"),
        ((q, k, v, ends(9), ends(5, -1, 5)), ValueError, "cu_seqlens_k must rise"),
        ((q, k, v, ends(4, 5), ends(9)), ValueError, "2 documents"),
    ):
        with pytest.raises(error, match=said):
            call(*given, causal=True)


@needs_interpreter
def test_a_second_gradient_is_refused(kernel: Any) -> None:
    inputs = made(9)
    out = kernel.flash_attn_varlen_func(*inputs, ends(9), ends(9), causal=True)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_a_cpu_without_the_interpreter_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    compiled = load(folder / "build" / "torch-cpu", "_compiled")
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        compiled.flash_attn_varlen_func(*made(9), ends(9), ends(9))


@needs_interpreter
def test_every_keyword_of_transformers_is_in_the_signature(kernel: Any) -> None:
    """Transformers leaves out what a kernel does not name: a window or sinks would be gone without a word."""
    from transformers import modeling_flash_attention_utils as flash

    given = set(inspect.signature(flash._process_flash_attention_kwargs).parameters)
    given -= {"query_length", "key_length", "is_causal", "softmax_scale", "use_top_left_mask", "kwargs"}
    given -= {"supports_mapping", "cache_seqlens"}  # the latter for `flash_attn_with_kvcache`, which it does not have
    assert {"dropout", "sliding_window", "softcap", "s_aux"} <= given
    named = {flash._hf_api_to_flash_mapping.get(name, name) for name in given}
    assert named <= set(inspect.signature(kernel.flash_attn_varlen_func).parameters)
    assert {"causal", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k"} <= set(
        inspect.signature(kernel.flash_attn_varlen_func).parameters
    )
    whole = inspect.signature(kernel.flash_attn_func).parameters  # gets the same keywords, without lengths
    assert named - {"max_seqlen_q", "max_seqlen_k", "block_table"} <= set(whole)
