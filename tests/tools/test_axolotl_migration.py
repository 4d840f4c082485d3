"""migrate: what is about attention becomes one name; every other byte stays."""

from __future__ import annotations

import codecs
import json
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from axattn.cli import app
from axattn.spec import names
from axattn.tools.axolotl import migration
from axattn.tools.axolotl.config import AttentionConfig
from axattn.tools.axolotl.migration import migrate, migrate_file

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
            "attn_implementation: flash_attention_2\ngemma4_hybrid_attn_impl: true # h\n",
        ),
        ("gemma4_hybrid_attn_impl: true\n", "gemma4_hybrid_attn_impl: true\n"),
        ("gemma4_hybrid_attn_impl: false\n", "gemma4_hybrid_attn_impl: false\n"),
        # a null or empty name beside a flag is written once
        ("attn_implementation:\nflash_attention: true\n", "attn_implementation: flash_attention_2\n"),
        ("sdp_attention: true # s\nattn_implementation: ~ # n\n", "# s\nattn_implementation: sdpa # n\n"),
        ("attn_implementation: ''\nflex_attention: true", "attn_implementation: flex_attention\n"),
        ("attn_implementation:\nflash_attention: false\n", "attn_implementation:\n"),
        # anchors go to the first alias that stays, and keep what they meant there
        ("x: &t true\nflash_attention: *t\n", "x: &t true\nattn_implementation: flash_attention_2\n"),
        (
            "flash_attention: &fa true # f\nsample_packing: *fa # p\ny: [*fa]\n",
            "attn_implementation: flash_attention_2 # f\nsample_packing: &fa true # p\ny: [*fa]\n",
        ),
        ("flash_attention: &f yes\nsdp_attention: *f\nz: *f", "attn_implementation: flash_attention_2\nz: &f yes"),
        ("sdp_attention: &n\nz: *n\n", "z: &n\n"),
        ("&k sdp_attention: off\nz: *k\n", "z: &k sdp_attention\n"),
        (
            "attn_implementation: &a flash\neval_attn: *a\n",
            "attn_implementation: flash_attention_2\neval_attn: &a flash\n",
        ),
        (
            "attn_implementation: {'': &a fa2, b: *a}\n",
            "attn_implementation: {'': flash_attention_2, b: flash_attention_2}\n",
        ),
        # merge keys that bring nothing of axattn
        (
            "b: &b {lr: 1}\n<<: *b\nlr: 2\nflash_attention: true\n",
            "b: &b {lr: 1}\n<<: *b\nlr: 2\nattn_implementation: flash_attention_2\n",
        ),
        ("b: &b\n  attn_implementation: sdpa\n<<: *b\n", "b: &b\n  attn_implementation: sdpa\n<<: *b\n"),
        # line ends that only YAML has, and only Python has
        ("# a\u2028flash_attention: true\u2028b: 1\n", "# a\u2028attn_implementation: flash_attention_2\u2028b: 1\n"),
        ("# one\rflash_attention: true\rx: 1\r", "# one\rattn_implementation: flash_attention_2\rx: 1\r"),
        (
            "x: |\n  flash_attention: true\nflash_attention: true\n",
            "x: |\n  flash_attention: true\nattn_implementation: flash_attention_2\n",
        ),
        ("  flash_attention: true\n  x: 1\n", "  attn_implementation: flash_attention_2\n  x: 1\n"),
        ("!!binary sdp_attention:\n", "!!binary sdp_attention:\n"),
        ("x: !env A\nflash_attention: !!bool on\n", "x: !env A\nattn_implementation: flash_attention_2\n"),
        ("\ufeffflash_attention: true\n", "\ufeffattn_implementation: flash_attention_2\n"),
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
        ("base: &b\n  flash_attention: true\n<<: *b\n", 3, "from a merge key"),
        ("base: &b\n  flash_attention: true\n<<: [*b]\nflash_attention: false\n", 3, "from a merge key"),
        ("base: &b\n  attn_implementation: sdpa\n<<: *b\nflash_attention: true\n", 4, "both given; keep one"),
        ("base: &b\n  attn_implementation: flash\n<<: *b\n", 2, "write attn_implementation: flash_attention_2 there"),
        ("attn_implementation: flash_attention_2\nflash_attention: true\n", 2, "both given; keep one"),
        ("attn_implementation: flash_attention_torch\n", 1, "is unknown. Names:"),
        ("attn_implementation: [fa2]\n", 1, "is a list; write one name"),
        ("attn_implementation: |\n  fa2\n", 1, "block scalar; change it by hand"),
        ("m: &m {'': fa2}\nattn_implementation: *m\n", 1, "change it by hand"),
        ("? flash_attention\n: true\n", 1, "change it by hand"),
        ("k: &k flash_attention\n*k : true\n", 1, "change it by hand"),
        ("flash_atention: true\n", 1, "flash_atention is not a setting; did you mean flash_attention?"),
        ("Flash-Attention: no\n", 1, "did you mean flash_attention?"),
        ("x: 1\nattn_implementaion: sdpa\n", 2, "did you mean attn_implementation?"),
        ("flash_attention: true\nd: 2024-13-45\n", 2, "2024-13-45 is not a valid date; quote it"),
        ("flash_attention: true\nx: {d: !!bool maybe}\n", 2, "maybe is not a valid bool"),
        ("flash_attention:\ttrue\n", 1, "use spaces instead of tabs"),
        ("x:\n\ty: 1\nflash_attention: true\n", 2, "use spaces instead of tabs"),
        ("flash_attention: true\nx: " + "[" * 1000 + "]" * 1000, 1, "nested too deeply"),
        ("flash_attention: true\nx: *none\n", 2, "found undefined alias 'none'"),
        ("x: \x07\nflash_attention: true\n", 1, "U+0007 is not allowed in YAML"),
        ("x: 1\nx: 2\nflash_attention: true\n", 2, "x is given twice, in line 1 and here; keep one"),
        ("flash_attention: false\n---\nx: 1\n", 1, "change it by hand"),
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


@pytest.mark.parametrize(
    "line",
    [
        "gemma4_hybrid_attn_impl: true",
        "large_head_attention: auto",
        "flash_attn_d512: true",
        "sdpa_varlen: false",
        "attn_decontaminates_packing: true",
        "flex_attn_compile_kwargs: {dynamic: false}",
        "scaling_softmax_factor: 0.43",
        "scaling_softmax_bias: 0.0",
        "sequence_parallel_degree: 2",
        "heads_k_stride: 1",
        "ring_attn_func: varlen_llama3",
        "eval_sample_packing: false",
        "use_kernels: true",
        "fused_attn_kernel: true",
    ],
)
def test_what_axolotl_reads_itself_stays_and_is_reported(line: str) -> None:
    key = line.partition(":")[0]
    done = migrate(f"{line}  # c\nflash_attention: true\n")
    assert done.after == f"{line}  # c\nattn_implementation: flash_attention_2\n"
    assert done.notes[0] == f"left unchanged, because axolotl reads them: {key}"
    assert migrate(f"{key}:\n").notes == ()


def test_a_computed_flag_in_a_file_is_reported() -> None:
    assert "is computed" in migrate("attn_uses_flash_lib: true\n").notes[0]


@pytest.mark.parametrize("key", ["flash_attn", "use_flash_attention", "eval_attention", "flash_attention: {a: 1}\nx"])
def test_settings_of_others_are_not_misspellings(key: str) -> None:
    done = migrate(f"{key.replace('attention: {', 'attention_2: {')}: true\n")
    assert not done.problems


POOL = (
    "base_model: org/model  # the model",
    "base: &base {lr: 1, flags: [&one true, yes]}",
    "more: &more\n  lr: 2\n  sdp_attention: true",
    "<<: *base",
    "<<: [*base, *more]",
    "on_anchor: &word flash",
    "true_anchor: &yes true",
    "null_anchor: &null ~",
    "flash_attention: *yes # f",
    "flash_attention: &fa true # f",
    "sdp_attention: *null",
    "sdp_attention: *fa",
    "'sage_attention': no",
    'xformers_attention: &x "true" #x',
    "attn_implementation:",
    "attn_implementation: &impl fa2 # a",
    "attn_implementation: *word",
    "attn_implementation: {'': &in flash, vision_config: *in}",
    "uses: [*fa, *fa]",
    "impl: *impl",
    "inner: *in",
    "x: *x",
    "text: |\n  flash_attention: true\n",
)


@given(st.lists(st.sampled_from(POOL), max_size=9), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_text_is_rewritten_with_its_meaning_or_left_alone(lines: list[str], end: str, last: bool) -> None:
    text = "\n".join(lines).replace("\n", end) + end * last
    done = migrate(text)
    if done.problems:
        assert not done.changed
        return
    before, after = yaml.safe_load(text) or {}, yaml.safe_load(done.after) or {}
    true = [key for key in names.LEGACY_FLAGS if before.pop(key, None) in (True, "true")]
    asked = before.get("attn_implementation")
    assert not (true and asked)
    if true:
        before["attn_implementation"] = names.LEGACY_FLAGS[true[0]]
    elif isinstance(asked, dict):
        before["attn_implementation"] = dict.fromkeys(asked, "flash_attention_2")
    elif asked:
        before["attn_implementation"] = "flash_attention_2"
    assert after == before
    assert sum(line.startswith("attn_implementation:") for line in done.after.splitlines()) <= 1
    assert [line.rpartition("#")[2] for line in text.splitlines() if "#" in line] == [
        line.rpartition("#")[2] for line in done.after.splitlines() if "#" in line
    ]
    assert migrate(done.after).after == done.after


def test_several_flags_are_noted() -> None:
    assert "s2_attention took precedence" in migrate("s2_attention: true\nflash_attention: true\n").notes[0]


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-32"])
def test_files_keep_their_bytes(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "c.yml"
    text = "name: caf\u00e9  # \u2026 more\r\nflash_attention: true\r\n"
    path.write_bytes(text.encode(encoding))
    assert migrate_file(path, write=True).changed
    assert path.read_bytes() == text.replace("flash_attention: true", "attn_implementation: flash_attention_2").encode(
        encoding
    )


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE])
def test_files_keep_their_byte_order(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "c.yml"
    encoding = f"utf-{8 * len(mark)}-be"
    path.write_bytes(mark + "flash_attention: true\n".encode(encoding))
    migrate_file(path, write=True)
    assert path.read_bytes() == mark + "attn_implementation: flash_attention_2\n".encode(encoding)


@pytest.mark.parametrize("raw", [b"f\0l\0a\0g\0:\0 \0t\0", b"\x00\x01", b"\x80\x81: ["])
def test_a_file_that_is_no_text_is_a_problem(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "c.yml"
    path.write_bytes(raw)
    assert migrate_file(path, write=True).problems
    assert path.read_bytes() == raw


def test_the_diff_of_a_text_without_a_last_line_end() -> None:
    shown = migrate("flash_attention: true").diff().splitlines()[3:]
    mark = "\\ No newline at end of file"
    assert shown == ["-flash_attention: true", mark, "+attn_implementation: flash_attention_2", mark]


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


def test_nothing_is_written_before_all_is_read_and_one_bad_file_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, date, gone, shut = (tmp_path / name for name in ("a.yml", "b.yml", "none.yml", "shut.yml"))
    for path in (good, shut):
        path.write_text("flash_attention: true\n")
    date.write_text("flash_attention: true\nd: 2024-13-45\n")
    written: list[str] = []
    plain = migration.migrate_found

    def migrate_found(found: migration.Found) -> migration.Migration | None:
        assert not written
        return plain(found)

    def write_bytes(path: Path, raw: bytes) -> int:
        if path == shut:
            raise PermissionError(13, "Permission denied")
        written.append(path.name)
        return path.write_text(raw.decode())

    found = json.loads(runner.invoke(app, ["migrate", "--json", str(good), str(date), str(gone)]).stdout)
    assert [len(one["problems"]) for one in found] == [0, 1, 1]
    monkeypatch.setattr(migration, "migrate_found", migrate_found)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    done = runner.invoke(app, ["migrate", "--write", *map(str, (good, shut, date, gone, good))])
    assert done.exit_code == 1
    assert written == ["a.yml"]
    assert done.stdout.count("+attn_implementation: flash_attention_2") == 1
    assert f"{date}:2: 2024-13-45 is not a valid date" in done.stderr
    assert f"{gone}:1: can't be read: No such file" in done.stderr
    assert f"{shut}:1: can't be written: Permission denied" in done.stderr
    assert done.stderr.endswith("4 files, 1 rewritten, 3 left unchanged because of problems\n")


def test_folders_hold_files_that_are_not_for_a_trainer(tmp_path: Path) -> None:
    texts = {
        "a.yml": "flash_attention: true\n",
        "UPPER.YML": "flash_attention: true\n",
        "old/a.yml": "flash_attention: true\n",
        "b.gen.yaml": "flash_attention: true\n",
        "chart.yaml": "{{- if .Values.on }}\nkind: Pod\n{{- end }}\n",
        "compose.yaml": "services:\n  web:\n\timage: x\n",
        "mkdocs.yml": "emoji: !!python/name:x.y\nwhen: 2024-13-45\n",
        ".github/ci.yml": "flash_attention: true\n",
        "venv/site-packages/x.yml": "flash_attention: true\n",
        "typo.yml": "flash_atention: true\n",
        "broken.yml": "flash_attention: [\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    options = ["--exclude", "old", "--exclude", "*.gen.yaml", "--write"]
    done = runner.invoke(app, ["migrate", str(tmp_path), *options])
    assert done.exit_code == 1
    assert done.stderr.endswith(
        "4 files, 2 rewritten, 2 left unchanged because of problems, 3 skipped (no attention setting)\n"
    )
    changed = {name for name, text in texts.items() if (tmp_path / name).read_text() != text}
    assert changed == {"a.yml", "UPPER.YML"}
    options += ["--exclude", f"{tmp_path}/typo.yml", "--exclude", "./broken.yml"]
    assert runner.invoke(app, ["migrate", str(tmp_path), *options]).exit_code == 0
    assert runner.invoke(app, ["migrate", str(tmp_path / "chart.yaml")]).exit_code == 1  # named itself


def test_write_and_check_contradict_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("flash_attention: true\n")
    done = runner.invoke(app, ["migrate", str(path), "--write", "--check"])
    assert done.exit_code == 1
    assert "--write and --check contradict each other" in done.stderr
    done = runner.invoke(app, ["migrate", str(path), "--write", "--check", "--json"])
    assert done.exit_code == 1
    assert "contradict" in json.loads(done.stdout)["error"]["message"]
    assert path.read_text() == "flash_attention: true\n"


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("flash_attention: true\n")
    terminal, process_end = pty.openpty()
    command = [sys.executable, "-m", "axattn", "migrate", str(tmp_path)]
    on = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=process_end, env=os.environ | {"TERM": "xterm"}, check=True
    )
    shown = os.read(terminal, 100_000).decode()
    assert "reading" in shown
    off = subprocess.run(command, capture_output=True, env=os.environ | {"FORCE_COLOR": "1"}, check=True)
    assert on.stdout == off.stdout
    assert off.stderr.decode() == "1 files, 1 would change\n"
