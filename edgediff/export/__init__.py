"""From a divided UNet to a bundle."""
