"""Data sets as tensors, and the files they come from."""
