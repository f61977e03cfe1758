"""Settings from YAML, strictly: a key that is unknown, missing or of the wrong type is refused by name.

YAML exists only here, at the edge.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from edgediff.errors import ConfigError, MissingExtraError
from edgediff_runtime.clock import format_mask
from edgediff_runtime.errors import one_line

S = TypeVar("S", bound=msgspec.Struct)


def read_yaml(path: Path, build: Callable[[object], S], what: str = "recipe") -> S:
    """Reads a YAML file of settings, which `build` makes of plain data; errors name the file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or `build` refuses it.
        MissingExtraError: There is no YAML reader.
    """
    try:
        import yaml
    except ImportError as e:
        raise MissingExtraError("reading a YAML recipe", "export") from e
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{what} {path}: cannot be read ({e.strerror or e})") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{what} {path}: not YAML ({one_line(e)})") from e
    try:
        return build(data if data is not None else {})
    except ConfigError as e:
        raise ConfigError(f"{what} {path}: {e}") from e


def strict(data: object, kind: type[S]) -> S:
    """Makes settings of plain data, without checks of ranges.

    ConfigError: a key is unknown (the nearest valid one is named), missing or mistyped.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a mapping of settings, got {type(data).__name__}")
    _refuse_unknown(data, kind, "")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(_one_line(e, kind)) from e


def retyped(settings: S) -> S:
    """Converts settings that were built by hand to their declared types; a ConfigError names what does not fit."""
    try:
        return msgspec.convert(msgspec.to_builtins(settings), type(settings))
    except msgspec.ValidationError as e:
        raise ConfigError(_one_line(e, type(settings))) from e
    except TypeError as e:
        raise ConfigError(f"a setting has a type that no recipe can have: {e}") from e


def check_ranges(
    settings: msgspec.Struct, above_0: tuple[str, ...] = (), from_0: tuple[str, ...] = (), shares: tuple[str, ...] = ()
) -> None:
    """Checks fields: above 0 or None, 0 or more, shares from 0 to below 1, and a ``seed`` of 31 bits."""
    for name in above_0:
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"'{name}' is {value}; expected a finite number above 0")
    for name in from_0:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"'{name}' is {value}; expected 0 or more")
    for name in shares:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(f"'{name}' is {getattr(settings, name)}; expected 0 or more, below 1")
    seed = getattr(settings, "seed", 0)
    if not 0 <= seed < 2**31:
        raise ConfigError(f"'seed' is {seed}; expected 0 to 2^31 - 1")


def clock_to_text(data: object) -> object:
    """Replaces a clock given as a list, [1, 0], by the mask's text, ``1,0``."""
    clock = data.get("clock") if isinstance(data, Mapping) else None
    if not isinstance(clock, list):
        return data
    if not clock or any(not isinstance(bit, int) or bit not in (0, 1) for bit in clock):
        raise ConfigError(f"'clock' is {clock}; expected a period such as 2 or a mask such as [1, 0, 1, 0]")
    assert isinstance(data, Mapping)
    return {**data, "clock": format_mask(clock)}


def _refuse_unknown(data: Mapping[Any, Any], kind: type[msgspec.Struct], where: str) -> None:
    """Names a key that the struct does not have, and the nearest that it has."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ConfigError(
                f"unknown key '{where}{key}', did you mean '{where}{near[0]}'? (valid: {', '.join(fields)})"
            )
        inner = fields[key]
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(value, inner, f"{where}{key}.")


def _one_line(e: msgspec.ValidationError, kind: type[msgspec.Struct]) -> str:
    message = str(e)
    if " - at `$." in message:
        text, _, where = message.partition(" - at `$.")
        choices = _choices(where.rstrip("`"), kind) if text.startswith("Invalid enum value") else ()
        expected = f"; expected one of: {', '.join(map(str, choices))}" if choices else ""
        return f"'{where.rstrip('`')}': {text[0].lower()}{text[1:]}{expected}"
    return message


def _choices(where: str, settings: type[msgspec.Struct]) -> tuple[str, ...]:
    """The values of a field such as ``onnx.dtype`` or ``targets[0]``, where they are a fixed few."""
    kind: Any = settings
    for name in where.partition("[")[0].split("."):
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == name)
        if NoneType in get_args(kind):  # a choice that may be left out
            kind = next(each for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return get_args(kind)
