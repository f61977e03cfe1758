"""ExecuTorch: one .pte program for XNNPACK."""
