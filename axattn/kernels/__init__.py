"""axattn's Triton kernels, where no library has one. Imported on use; triton is optional."""
