"""A control image: what a bundle's ControlNet is handed, or the zeros that stand for its residuals without one."""

from dataclasses import dataclass

import numpy as np

from edgediff_runtime.conditioning import plain
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import CONTROL_IMAGE, CONTROL_SCALE, CONTROLNET, Graph
from edgediff_runtime.pictures import images_of
from edgediff_runtime.sessions import Array


@dataclass(frozen=True)
class Steering:
    """The graphs that a generation runs, and what they are handed for its control image, [N, ...] by name."""

    graphs: tuple[Graph, ...]
    tensors: dict[str, Array]


def steer(graphs: tuple[Graph, ...], image: object, scale: float | None, count: int) -> Steering:
    """Reads a control image for a number of images.

    Args:
        graphs: The UNet's, for the size that is drawn.
        image: As `images_of` takes it, of the picture's size; None draws without it, and the ControlNet does not run.
        scale: What residuals are multiplied by; None is 1.

    Raises:
        RequestError: There is no ControlNet, or the image or the scale does not fit.
    """
    net = next((graph for graph in graphs if graph.name == CONTROLNET), None)
    if net is None:
        if image is not None:
            raise RequestError(
                "control_image was given, but the bundle has no ControlNet; leave it out, or export with --control DIR"
            )
        if scale is not None:
            raise RequestError("controlnet_conditioning_scale was given, but there is no ControlNet; leave it out")
        return Steering(graphs, {})
    if image is None:
        if scale is not None:
            raise RequestError("controlnet_conditioning_scale was given without a control_image; give one")
        residuals = {t.name: np.zeros((count, *map(int, t.shape[1:])), dtype=t.dtype) for t in net.outputs}
        return Steering(tuple(graph for graph in graphs if graph is not net), residuals)
    factor = 1.0 if scale is None else plain(scale)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < np.inf:
        raise RequestError(f"controlnet_conditioning_scale is {scale!r}; expected a finite number from 0")
    taken = {tensor.name: tensor for tensor in net.inputs}
    height, width = map(int, taken[CONTROL_IMAGE].shape[2:])
    images = images_of(image, height, width, "control_image")
    if len(images) not in (1, count):
        raise RequestError(f"control_image has {len(images)} pictures for {count} images; expected 1 or {count}")
    rows = np.broadcast_to(images, (count, *images.shape[1:])).transpose(0, 3, 1, 2)
    pixels = np.ascontiguousarray(rows).astype(np.float32) / np.float32(255)
    return Steering(graphs, {CONTROL_IMAGE: pixels, CONTROL_SCALE: np.full(count, factor, dtype=np.float32)})
