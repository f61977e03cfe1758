"""Random numbers of a training: they follow from its seed and a number, so that it can be resumed anywhere."""

import torch

# 2^32 over the golden ratio: seeds lie far apart, and seed 0 is the number itself.
_APART = 0x9E3779B9
# torch's generator on the CPU takes no more of a seed than this.
_BITS = 2**32


def generator(seed: int, number: int) -> torch.Generator:
    """A generator on the CPU, another one for each seed and number (of the update or the pass, below 2^32)."""
    return torch.Generator().manual_seed(mixed(seed, number))


def mixed(seed: int, number: int) -> int:
    """One seed, 0 to 2^32 - 1, of a training's and a number below 2^32."""
    return (number + seed * _APART) % _BITS
