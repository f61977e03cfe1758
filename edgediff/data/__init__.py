"""Image folders, arrays and batches, under training and evaluation."""
