"""Which format each weight of a component is stored in: one for all of them, or what a plan says.

A plan is a JSON file: ``{"model": NAME, "components": {"unet": {"conv_in.weight": "int8", ...}, ...}}``. What it leaves
out stays as it is.
"""

from pathlib import Path
from typing import get_args

import msgspec

from edgediff.errors import ConfigError
from edgediff_runtime.bundle import sha256_of
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import WeightFormat

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
# Of each element; scales and tables come to it.
BITS: dict[str, int] = {
    "fp16": 16, "int8": 8, "int4": 4, "palette8": 8, "palette6": 6, "palette4": 4, "palette3": 3, "palette2": 2,
}  # fmt: skip


class WeightPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Formats by the weights' names, by component.

    Attributes:
        model: What it was made for.
    """

    components: dict[str, dict[str, WeightFormat]]
    model: str = ""


def read_plan(path: str | Path) -> WeightPlan:
    """Reads a plan; a ConfigError says what is wrong with it."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=WeightPlan)
    except OSError as e:
        raise ConfigError(
            f"weights {str(path)!r}: no format, and no plan that can be read ({e.strerror}); expected one of: "
            f"{', '.join(WEIGHT_FORMATS)}, or a plan of weights"
        ) from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not a plan of weights: {one_line(e)}") from e


def planned(asked: str, component: str) -> WeightFormat | dict[str, WeightFormat]:
    """What is asked for of a component: one format for all of its weights, or formats by their names."""
    if asked in BITS:
        return asked  # type: ignore[return-value]
    return read_plan(asked).components.get(component, {})


def named_by_content(asked: str) -> str:
    """What is asked for of weights, a plan by its SHA-256."""
    return asked if asked in BITS else f"sha256:{sha256_of(Path(asked))}"


def formats_of(asked: str | None, component: str) -> set[WeightFormat]:
    """The formats that a component's weights may have, of what is asked for; none where they stay as they are."""
    if asked is None:
        return set()
    found = planned(asked, component)
    return {found} if isinstance(found, str) else set(found.values())


def coarsest(asked: str | None, component: str) -> WeightFormat | None:
    """The format of the fewest bits that is asked for; None where weights stay as they are."""
    return min(formats_of(asked, component), key=lambda form: (BITS[form], form), default=None)
