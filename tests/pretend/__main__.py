"""``python -m tests.pretend [--backend ...]``: cells of the matrix on pretended GPUs; prints what is wrong."""

from tests.pretend import machine

machine.load()  # before torch
if machine.WHY_NOT:
    raise SystemExit(machine.WHY_NOT)

import argparse  # noqa: E402
import collections  # noqa: E402
import sys  # noqa: E402


def main() -> int:
    """1 if any cell is wrong."""
    from tests.conformance.__main__ import _prepare
    from tests.conformance.cells import every_key, sampled
    from tests.pretend import matrix

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("backend", "family", "scenario"):
        parser.add_argument(f"--{name}", action="append")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--place", action="append")
    parser.add_argument("--refused", action="store_true", help="print what is refused, too")
    arguments = parser.parse_args()
    _prepare()
    asked = (arguments.backend, arguments.family, arguments.scenario)
    counts = collections.Counter()
    for key in every_key():
        if not all(not only or part in only for only, part in zip(asked, key, strict=True)):
            continue
        if key[2] == "compiled, fullgraph":  # torch.compile does not trace below a dispatch mode
            continue
        if arguments.sampled and not sampled(key):
            continue
        for place in arguments.place or matrix.PLACES:
            cell = matrix.run(*key, place)
            counts[place, cell.backend, cell.status] += 1
            if cell.status == "wrong" or (arguments.refused and cell.status == "refused"):
                print(cell.status, place, *key, cell.error, cell.detail[:300], flush=True)
    print(counts)
    return int(any(status == "wrong" for _, _, status in counts))


if __name__ == "__main__":
    sys.exit(main())
