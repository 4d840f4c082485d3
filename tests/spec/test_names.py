from __future__ import annotations

import pytest

from axattn.errors import UnknownAttentionError
from axattn.spec import names

HUB = ["org/name", "org/name@main", "org/name@v1.2:fn", "kernels-community/flash-attn2:flash_attn_func"]


@pytest.mark.parametrize("name", [*names.CANONICAL, *HUB])
def test_canonical_names_and_hub_paths_pass_unchanged(name: str) -> None:
    assert names.canonicalise(name) == name


@pytest.mark.parametrize(("short", "canonical"), sorted(names.SHORT_FORMS.items()))
def test_short_forms_are_refused_with_the_canonical_name(short: str, canonical: str) -> None:
    with pytest.raises(UnknownAttentionError, match=f'Write attn_implementation="{canonical}"'):
        names.canonicalise(short)


@pytest.mark.parametrize(
    ("spelling", "canonical"), [("SDPA", "sdpa"), (" sage ", "sage"), ("Flash-Attn", "flash_attention_2")]
)
def test_other_spellings_are_refused_with_the_canonical_name(spelling: str, canonical: str) -> None:
    with pytest.raises(UnknownAttentionError, match=f'"{canonical}"'):
        names.canonicalise(spelling)


def test_every_short_form_points_to_a_canonical_name_and_is_none_itself() -> None:
    assert set(names.SHORT_FORMS.values()) <= set(names.CANONICAL)
    assert not set(names.SHORT_FORMS) & set(names.CANONICAL)


def test_a_misspelling_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(UnknownAttentionError, match='Did you mean "flex_attention"') as caught:
        names.canonicalise("flex_atention")
    assert "varlen" in str(caught.value)


@pytest.mark.parametrize("path", ["org/", "/name", "a/b/c", "org/name@", "org/name:", "org/na me", "org/name:1fn"])
def test_malformed_hub_paths_are_refused(path: str) -> None:
    with pytest.raises(UnknownAttentionError, match="hub kernel"):
        names.canonicalise(path)


def test_a_hub_path_is_parsed() -> None:
    path = names.parse_hub_path("org/name@v1:fn")
    assert path == names.HubPath("org/name", "v1", "fn")
    assert str(path) == "org/name@v1:fn"


def test_paged_names_pass_for_native_names_and_are_refused_for_axattn_backends() -> None:
    assert names.canonicalise("paged|sdpa") == "paged|sdpa"
    with pytest.raises(UnknownAttentionError, match="no paged cache"):
        names.canonicalise("paged|sage")


def test_dicts_are_checked_entry_by_entry_and_report_all() -> None:
    good = {"": "sdpa", "text_config": {"": "varlen", "inner": "auto"}}
    assert names.canonicalise_all(good) == good
    assert names.names_in(good) == ["sdpa", "varlen", "auto"]
    with pytest.raises(UnknownAttentionError) as caught:
        names.canonicalise_all({"": "fa2", "text_config": {"a": "bogus"}, "b": {}})
    for part in ("flash_attention_2", "text_config.a", "the dict b is empty"):
        assert part in str(caught.value)
    assert len(caught.value.reasons) == 3


@pytest.mark.parametrize("value", [3, None, ["sdpa"]])
def test_values_that_are_no_names_are_refused(value: object) -> None:
    with pytest.raises(UnknownAttentionError, match="must be a name"):
        names.canonicalise(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "packing", "flash", "cast"),
    [
        ("eager", False, False, False),
        ("sdpa", False, False, False),
        ("flash_attention_2", True, True, True),
        ("flash_attention_3", True, True, True),
        ("flash_attention_4", True, True, True),
        ("flex_attention", True, False, True),
        ("xformers", True, False, True),
        ("sage", True, False, True),
        ("varlen", True, False, True),
        ("s2", False, True, True),
        ("fp8", True, False, True),
        ("auto", True, False, False),
        ("kernels-community/flash-attn2@v1:fn", True, True, True),
        ("kernels-community/flash-attn3", True, True, True),
        ("kernels-community/vllm-flash-attn3@x", True, True, True),
        ("kernels-community/flash-attn4", True, True, True),
        ("kernels-community/sage-attention:sageattn", True, False, True),
        ("someone/else@v1", False, False, True),
    ],
)
def test_flags_by_name(name: str, packing: bool, flash: bool, cast: bool) -> None:
    assert names.flags(name) == names.NameFlags(packing, flash, cast)
