"""The torch-free runtime of edgediff bundles: the manifest, the clock, the samplers and the loop.

>>> from edgediff_runtime import EdgePipeline                       # doctest: +SKIP
>>> pipe = EdgePipeline.from_pretrained("bundle/")                  # doctest: +SKIP
>>> pipe(label="Orange", num_inference_steps=8, clock=2).images     # doctest: +SKIP
"""

from edgediff_runtime.bundle import Bundle, open_bundle
from edgediff_runtime.clock import clock_mask
from edgediff_runtime.errors import BundleError, EdgeRuntimeError, OperatingPointWarning, RequestError
from edgediff_runtime.loop import Step, denoise
from edgediff_runtime.manifest import Manifest
from edgediff_runtime.noise import noise
from edgediff_runtime.pipeline import EdgePipeline, Result
from edgediff_runtime.schedulers import SchedulerConfig, make_scheduler

__all__ = [
    "Bundle",
    "BundleError",
    "EdgePipeline",
    "EdgeRuntimeError",
    "Manifest",
    "OperatingPointWarning",
    "RequestError",
    "Result",
    "SchedulerConfig",
    "Step",
    "clock_mask",
    "denoise",
    "make_scheduler",
    "noise",
    "open_bundle",
]
