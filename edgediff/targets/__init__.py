"""Target formats: a folder each, and this table. A new one is a folder and its name here."""

from importlib import import_module

from edgediff.targets.base import Target

NAMES = ("onnx", "coreml", "openvino", "executorch", "litert")
TARGETS: dict[str, Target] = {name: import_module(f"edgediff.targets.{name}").TARGET for name in NAMES}
