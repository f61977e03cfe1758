"""Proof that a bundle computes what the model computes."""
