"""``python -m axattn``: the command line."""

from axattn.cli import main

main()
