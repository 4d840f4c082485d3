"""A plugin for ms-swift 4.6, which allows packing for flash names only. With it, packed rows run on axattn:

swift sft --model MODEL --dataset DATA --packing true --attn_impl varlen --external_plugins examples/ms_swift.py
"""

from swift.arguments import SftArguments

swifts_check = SftArguments._check_padding_free


def check_padding_free(self: SftArguments) -> None:
    """Allow axattn's backends that keep the documents of a row apart; ask ms-swift about the other names."""
    if self.attn_impl in ("auto", "varlen", "sage", "fp8", "xformers"):  # registered by axattn's entry point
        self.padding_free = self.padding_free or self.packing
    else:
        swifts_check(self)


SftArguments._check_padding_free = check_padding_free
