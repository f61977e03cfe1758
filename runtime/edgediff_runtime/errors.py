"""What a user of the runtime can put right.

Constraints: the runtime is embedded in programs that show these messages as they are, so each one is a single
line that says what was given and what was expected; and a caller who knows nothing of this package catches
``ValueError`` and is served. Errors of the program itself keep their own types.
"""


class EdgeRuntimeError(ValueError):
    """Something that a user of the runtime can put right; the message is one line."""


class BundleError(EdgeRuntimeError):
    """The bundle is damaged, unsafe to open, or of another version."""


class NotFiniteError(BundleError):
    """A bundle's model gave NaN or infinity on the way: its weights or its precision are wrong."""


class RequestError(EdgeRuntimeError):
    """What was asked does not fit the bundle: a label, a clock, a number of steps, a guidance scale."""
