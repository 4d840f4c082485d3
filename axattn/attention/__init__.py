"""The attention function that Transformers calls: reads a call, dispatches it to a backend; and its registration.

Kernels are in `axattn.backends`, plans in `axattn.planning`.
"""
