"""The INT8 kernel as a folder that Hugging Face's ``kernels`` loads, made from axattn's own sources.

``int8-flash-attn/`` holds what is written by hand (build.toml, the card, the functions that Transformers calls);
`hub_kernel.make` puts it together with the kernel code of ``axattn/``.
"""
