"""Training: image folders, and the networks that learn from them."""
