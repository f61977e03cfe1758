"""The command line: the only place that prints or exits.

Results go to standard output, progress and errors to standard error. Exit codes: 0 fine, 1 a check failed, 2 usage or
bad input, 130 interrupted. Commands import what they need when they run: `run`, `verify`, `inspect` of a bundle and
`doctor` work on the light install, without torch; `site` too, and `serve` with its extra.
"""

# Each module adds its commands to the application, in the order in which the help lists them.
from edgediff.cli import export, run, invert, convert_lora, inspect, plan, plan_weights, train  # noqa: F401, I001
from edgediff.cli import demo, evaluate, bench, serve, site  # noqa: F401
from edgediff.cli.app import app, main

__all__ = ["app", "main"]
