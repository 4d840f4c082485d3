"""What axattn relies on in Transformers: a new version that changes it is named here first."""

from __future__ import annotations

import logging

import pytest
import transformers
from packaging.version import Version

from axattn.hf import contracts


@pytest.mark.parametrize("fact", contracts.FACTS)
def test_transformers_is_as_axattn_takes_it_to_be(fact: str) -> None:
    assert contracts.FACTS[fact]() == ""


def test_the_installed_version_is_a_tested_one() -> None:
    low, high = (Version(version) for version in contracts.TESTED)
    assert low <= Version(transformers.__version__) <= high


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.23.4"])
def test_a_tested_version_says_nothing(version: str, caplog: pytest.LogCaptureFixture) -> None:
    contracts.warn_if_newer(version)
    assert not caplog.records


def test_a_newer_version_is_warned_of_and_what_changed_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "axattn"):
        contracts.warn_if_newer("5.31.0")
    assert "transformers 5.31.0 is newer than the newest tested (5.23.0): nothing" in caplog.text
    caplog.clear()
    monkeypatch.delattr("transformers.masking_utils.chunked_overlay")
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, q_length: None)
    with caplog.at_level(logging.WARNING, "axattn"):
        contracts.warn_if_newer("6.0.0")
    assert "closures of mask functions (AttributeError" in caplog.text
    assert "sdpa_mask takes no allow_is_bidirectional_skip" in caplog.text
