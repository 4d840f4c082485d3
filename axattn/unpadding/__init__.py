"""``unpad=True``: padded batches run as one packed row. The row's documents are known to `axattn.documents`."""
