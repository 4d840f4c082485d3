from __future__ import annotations

import json

import pytest

from tests.conformance import report
from tests.conformance.cells import BACKENDS, Cell, every_key


def test_the_document_is_made_of_the_record() -> None:
    assert report.DOCUMENT.read_text() == report.render(report.load()), "stale: run `make conformance`"


def test_the_record_holds_every_cell_of_the_matrix_and_no_other() -> None:
    recorded = {
        (backend, family, scenario)
        for backend, rows in report.load()["cells"].items()
        for scenario, row in rows.items()
        for family in row
    }
    assert recorded == set(every_key()), "stale: run `make conformance`"


def test_a_record_is_written_and_read_back() -> None:
    cells = [
        Cell("auto", "llama", "dense", "ok", 1e-7),
        Cell("sdpa", "llama", "dense", "refused", detail="because"),
        Cell("sdpa", "gemma2", "dense", "wrong", 0.5, "logits: 0.5"),
    ]
    made = report.record(cells, {"torch": "2"})
    assert json.loads(report.dump(made)) == made
    assert [(c.backend, c.family, c.status, c.detail) for c in report.cells_of(made)] == [
        ("auto", "llama", "ok", ""),
        ("sdpa", "llama", "refused", "because"),
        ("sdpa", "gemma2", "wrong", "logits: 0.5"),
    ]
    assert report.totals(made)["sdpa"] == {"refused": 1, "wrong": 1}
    assert "1: because" in report.render(made)
    assert "**1 wrong**" in report.render(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_name_of_the_matrix_is_in_the_document(backend: str) -> None:
    assert f"`{backend}`" in report.DOCUMENT.read_text()
