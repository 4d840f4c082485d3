"""The entry point of the group ``torch.backends``: ``import torch`` calls it in every process, child processes too.

It stays outside the package `axattn`, so that it can report a broken installation of it instead of breaking
``import torch``: torch raises whatever an entry point raises, failed imports included.
"""

import os


def register() -> None:
    """Have axattn's backends registered as soon as Transformers is imported. Never raises.

    Imports neither torch nor Transformers. Does nothing under ``AXATTN_AUTOLOAD=0``. A failure is logged as a warning.
    """
    if os.environ.get("AXATTN_AUTOLOAD", "").lower() in ("0", "false", "no"):
        return
    try:
        from axattn.attention.registration import register_when_imported

        register_when_imported()
    except Exception as error:
        import logging

        logging.getLogger("axattn").warning(
            "axattn: its backends are not registered, its installation seems broken (%s: %s). Reinstall it, or turn "
            "this off with AXATTN_AUTOLOAD=0.",
            type(error).__name__,
            error,
        )
