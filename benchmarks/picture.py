"""README's picture, light and dark, measured: which tokens change which logits (``python -m benchmarks.picture``)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import axattn
from benchmarks.measure import ROOT

LENGTHS = (5, 4, 6)
COLOURS = {
    "light": {"text": "#1f2328", "grid": "#d0d7de", "own": "#56b4e9", "leak": "#d55e00", "edge": "#57606a"},
    "dark": {"text": "#e6edf3", "grid": "#30363d", "own": "#56b4e9", "leak": "#e8743b", "edge": "#8b949e"},
}
CELL, TOP, LEFT, GAP = 14, 64, 24, 96


def picture_path(mode: str) -> Path:
    """Where a picture lies: ``light`` or ``dark``."""
    return ROOT / "docs" / f"leak-{mode}.svg"


@torch.no_grad()
def changed(name: str) -> list[list[bool]]:
    """`[S, S]`: whether another token in place j changes the logits in place i of a packed row, with the cache on."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    if name != "sdpa":
        axattn.apply(model, name)
    ids = torch.arange(3, 3 + sum(LENGTHS))[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    logits = model(ids, position_ids=positions).logits[0]
    columns = []
    for j in range(ids.shape[1]):
        other = ids.clone()
        other[0, j] += 40
        moved = (model(other, position_ids=positions).logits[0] - logits).abs().amax(-1) > 1e-4
        columns.append(moved)
    return torch.stack(columns, 1).tolist()


def drawn(mode: str, found: dict[str, list[list[bool]]]) -> str:
    """The picture as SVG."""
    colour = COLOURS[mode]
    document = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    side = len(document) * CELL
    width, height = 2 * LEFT + 2 * side + GAP, TOP + side + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Which tokens change which logits in a packed row of three documents</title>",
    ]

    def text(x: float, y: float, words: str, more: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" fill="{colour["text"]}" {more}>{words}</text>')

    for number, (title, cells) in enumerate(found.items()):
        x0 = LEFT + number * (side + GAP)
        leaks = sum(cell and document[i] != document[j] for i, row in enumerate(cells) for j, cell in enumerate(row))
        text(x0, TOP - 34, title, 'font-weight="600"')
        text(x0, TOP - 14, f"{leaks} places read another document" if leaks else "no place reads another document")
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                kind = "grid" if not cell else "own" if document[i] == document[j] else "leak"
                opacity = ' fill-opacity="0.35"' if kind == "grid" else ""
                at = f'x="{x0 + j * CELL + 1}" y="{TOP + i * CELL + 1}"'
                parts.append(
                    f'<rect {at} width="{CELL - 2}" height="{CELL - 2}" rx="2" fill="{colour[kind]}"{opacity}/>'
                )
        start = 0
        for length in LENGTHS:
            at = f'x="{x0 + start * CELL}" y="{TOP + start * CELL}"'
            size = length * CELL
            parts.append(f'<rect {at} width="{size}" height="{size}" fill="none" stroke="{colour["edge"]}"/>')
            start += length
    caption = "Three documents in one row. Filled: the token of this column changes the logits of this row."
    text(LEFT, TOP + side + 24, caption, 'font-size="11.5"')
    return "\n".join([*parts, "</svg>"]) + "\n"


def pictures() -> dict[str, str]:
    """Both pictures, measured now."""
    found = {"Transformers, sdpa, use_cache on": changed("sdpa"), "axattn, auto": changed("auto")}
    return {mode: drawn(mode, found) for mode in COLOURS}


def main() -> None:
    """Write both."""
    for mode, picture in pictures().items():
        picture_path(mode).write_text(picture)


if __name__ == "__main__":
    main()
