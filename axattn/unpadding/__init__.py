"""``unpad=True``: padded batches run as one packed row, whose documents `axattn.documents` handles.

``share_prefixes=True``: and what documents have in common at their start runs once.
"""
