"""``python -m tests.conformance``: run the matrix (or a part), print the summary, write JSON and the document."""

from __future__ import annotations

import argparse
import sys

import torch
import transformers
from tqdm import tqdm

from tests.conformance import cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", action="append", help="only these")
    parser.add_argument("--family", action="append")
    parser.add_argument("--scenario", action="append")
    parser.add_argument("--skip", action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    asked = [(arguments.backend, 0), (arguments.family, 1), (arguments.scenario, 2)]
    skip = arguments.skip or ()
    keys = [
        key
        for key in cells.every_key()
        if all(not only or key[at] in only for only, at in asked) and key[2] not in skip
    ]
    found = []
    for key in tqdm(keys, disable=not sys.stderr.isatty()):
        cell = cells.run(*key)
        found.append(cell)
        if cell.status == "wrong":
            print(cell, flush=True)
    import collections

    print(collections.Counter((c.backend, c.status) for c in found))
    return int(any(cell.status == "wrong" for cell in found))


if __name__ == "__main__":
    sys.exit(main())
