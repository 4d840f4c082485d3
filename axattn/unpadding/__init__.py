"""``unpad=True``: padded batches run as one packed row, whose documents `axattn.documents` handles."""
