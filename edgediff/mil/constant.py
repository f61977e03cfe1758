"""Constants of a program: mapped from the weight file, and in fp32 once something computes with them."""

import functools
from collections.abc import Hashable
from typing import Any

import numpy as np
from torch import Tensor

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import hold


class Constant:
    """A constant of a program; its fp32 copy is made when a function first wants it as a tensor.

    Attributes:
        dtype: What it is declared to be.
        array: As it is stored, on the mapped weight file where it lies in one; or a string.
        key: Equal for constants of equal content, whichever function they belong to.
    """

    def __init__(self, dtype: str, array: np.ndarray | str, key: Hashable) -> None:
        self.dtype = dtype
        self.array = array
        self.key = key

    @functools.cached_property
    def tensor(self) -> Tensor:
        """The constant as ops take it."""
        if isinstance(self.array, str):
            raise ProgramError(f"the string {self.array!r} instead of a tensor")
        return hold(self.array)

    @property
    def number(self) -> Any:
        """The constant as a plain number, string, or nested list of them."""
        return self.array if isinstance(self.array, str) else self.array.tolist()
