"""migrate: what is about attention becomes one name; every other byte stays."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from axattn import names
from axattn.cli import app
from axattn.config import AttentionConfig
from axattn.migration import migrate, migrate_file

runner = CliRunner()
WHOLE = """\
# a run
base_model: org/model   # the model
load_in_8bit: &quick true
flash_attention: *quick  # fast

sequence_len: 2048
sdp_attention: false
"xformers_attention": null # not any more
datasets:
  - path: "a.json"
    flash_attention: true   # somebody else's key
"""
MIGRATED = """\
# a run
base_model: org/model   # the model
load_in_8bit: &quick true
attn_implementation: flash_attention_2  # fast

sequence_len: 2048
# not any more
datasets:
  - path: "a.json"
    flash_attention: true   # somebody else's key
"""


def test_a_whole_file() -> None:
    done = migrate(WHOLE)
    assert done.after == MIGRATED
    assert not done.problems
    assert "-flash_attention: *quick" in done.diff()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("flash_attention: true\n", "attn_implementation: flash_attention_2\n"),
        ("sage_attention: yes\n", "attn_implementation: sage\n"),
        ("xformers_attention: True", "attn_implementation: xformers"),
        ("flex_attention: 'true'\r\nx: 1\r\n", "attn_implementation: flex_attention\r\nx: 1\r\n"),
        ("eager_attention: on # why\n", "attn_implementation: eager # why\n"),
        ("flash_attention: false\nx: 1\n", "x: 1\n"),
        ("flash_attention:\nx: 1\n", "x: 1\n"),
        ("attn_implementation: fa2\n", "attn_implementation: flash_attention_2\n"),
        ('attn_implementation: "SDP"  # k\n', 'attn_implementation: "sdpa"  # k\n'),
        (
            "attn_implementation:\n  '': fa3 # a\n  text_config: sdpa\n",
            "attn_implementation:\n  '': flash_attention_3 # a\n  text_config: sdpa\n",
        ),
        (
            "attn_implementation: {'': fa2, b: flex}\n",
            "attn_implementation: {'': flash_attention_2, b: flex_attention}\n",
        ),
        ("s2_attention: true\nflash_attention: true\n", "attn_implementation: s2\n"),
        (
            "x: 1\n---\nflash_attention: true\n---\ny: 2\n",
            "x: 1\n---\nattn_implementation: flash_attention_2\n---\ny: 2\n",
        ),
        (
            "flash_attention: true\ngemma4_hybrid_attn_impl: true # h\n",
            "attn_implementation: flash_attention_2\non_unsupported: route # h\n",
        ),
        ("gemma4_hybrid_attn_impl: true\n", "attn_implementation: flash_attention_2\non_unsupported: route\n"),
        ("gemma4_hybrid_attn_impl: false\n", ""),
        (
            "attn_implementation: kernels-community/flash-attn2@v1\n",
            "attn_implementation: kernels-community/flash-attn2@v1\n",
        ),
        ("x: 1\n", "x: 1\n"),
        ("", ""),
        ("- a\n- b\n", "- a\n- b\n"),
    ],
)
def test_rewriting(before: str, after: str) -> None:
    done = migrate(before)
    assert done.problems == ()
    assert done.after == after
    assert migrate(done.after).after == after  # a second time changes nothing


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("x: 1\nflash_attention: true\nattn_implementation: sdpa\n", 2, "both given; keep one"),
        ("flash_attention: maybe\n", 1, "not true or false"),
        ("x: 1\nattn_implementation: nonsense\n", 2, "is unknown"),
        ("base: &b\n  flash_attention: true\n<<: *b\n", 1, "through a merge key"),
        ("{flash_attention: true}\n", 1, "change it by hand"),
        ("flash_attention:\n  true\n", 1, "change it by hand"),
        ("a: 1\nb: [\n", 3, "can't be read as YAML"),
        ("flash_attention: true\nflash_attention: false\n", 2, "can't be read as YAML"),
        ("sage_attention: true\ngemma4_hybrid_attn_impl: true\n", 2, "works with flash_attention_2 only"),
        ("attn_implementation: sdpa\ngemma4_hybrid_attn_impl: true\n", 2, "works with flash_attention_2 only"),
    ],
)
def test_conflicts_name_their_line_and_nothing_is_changed(text: str, line: int, part: str) -> None:
    done = migrate(text, "c.yml")
    assert not done.changed
    (problem,) = done.problems
    assert part in problem.text
    assert problem.line == line


def test_several_flags_are_noted() -> None:
    assert "s2_attention is the one that counted" in migrate("s2_attention: true\nflash_attention: true\n").notes[0]


@given(
    st.dictionaries(
        st.sampled_from(list(names.LEGACY_FLAGS)), st.sampled_from(["true", "false", "yes", "null"]), max_size=4
    ),
    st.lists(st.sampled_from(["# note", "x: 1", "", "y: 'a b'  # z"]), max_size=3, unique=True),
)
def test_what_comes_out_means_what_went_in(flags: dict[str, str], others: list[str]) -> None:
    text = "".join(f"{line}\n" for line in [*others, *(f"{key}: {value}" for key, value in flags.items())])
    done = migrate(text)
    assert not done.problems
    assert not any(flag in done.after for flag in flags if flag not in ("flex_attention", "flash_attention"))
    true = [key for key in names.LEGACY_FLAGS if flags.get(key) in ("true", "yes")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = AttentionConfig(**dict.fromkeys(true, True)).attn_implementation
    written = [line for line in done.after.splitlines() if line.startswith("attn_implementation")]
    assert written == ([f"attn_implementation: {wanted}"] if wanted else [])
    assert all(line in done.after for line in others)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_files_keep_their_bytes(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "c.yml"
    text = "name: caf\u00e9\r\nflash_attention: true\r\n"
    path.write_bytes(text.encode(encoding))
    assert migrate_file(path, write=True).changed
    assert path.read_bytes() == text.replace("flash_attention: true", "attn_implementation: flash_attention_2").encode(
        encoding
    )


def test_the_routed_form_is_a_config() -> None:
    found = AttentionConfig(attn_implementation="flash_attention_2", on_unsupported="route")
    assert found.on_unsupported == "route"


# ---- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yml", tmp_path / "bad.yaml"
    good.write_text(WHOLE)
    done = runner.invoke(app, ["migrate", str(good)])
    assert done.exit_code == 0
    assert "+attn_implementation: flash_attention_2  # fast" in done.stdout
    assert good.read_text() == WHOLE
    assert runner.invoke(app, ["migrate", str(good), "--check"]).exit_code == 1
    assert runner.invoke(app, ["migrate", str(good), "--write"]).exit_code == 0
    assert good.read_text() == MIGRATED
    assert runner.invoke(app, ["migrate", str(good), "--check"]).exit_code == 0
    bad.write_text("flash_attention: true\nattn_implementation: sdpa\n")
    done = runner.invoke(app, ["migrate", str(tmp_path), "--write"])
    assert done.exit_code == 1
    assert f"{bad}:1: flash_attention and attn_implementation" in done.stderr
    assert bad.read_text().startswith("flash_attention")
    found = json.loads(runner.invoke(app, ["migrate", str(tmp_path), "--json"]).stdout)
    assert [len(one["problems"]) for one in found] == [1, 0]
    assert runner.invoke(app, ["migrate", str(tmp_path / "none.yml")]).exit_code == 1
