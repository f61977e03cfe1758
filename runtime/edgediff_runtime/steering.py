"""A control image: what a bundle's ControlNet is handed, or the zeros that stand for its residuals without one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.conditioning import factor
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import CONTROL_IMAGE, CONTROL_SCALE, CONTROLNET, Graph, Tensor
from edgediff_runtime.pictures import images_of
from edgediff_runtime.sessions import Array


@dataclass(frozen=True)
class Steering:
    """What a request says of control, checked.

    Attributes:
        graphs: Those that run: the ControlNet only where there is a control image.
        images: uint8 [1 or N, h, w, 3]; None where nothing steers.
        scale: What residuals are multiplied by.
        residuals: Those that the UNet takes and nothing makes.
    """

    graphs: tuple[Graph, ...]
    images: NDArray[np.uint8] | None = None
    scale: float = 1.0
    residuals: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        """How many control images there are; 1 where one is for all images, or there are none."""
        return 1 if self.images is None else len(self.images)

    def tensors(self, count: int) -> dict[str, Array]:
        """What the graphs are handed for so many images, [count, ...] by name.

        Raises:
            RequestError: There is more than one control image, and not one for each.
        """
        if self.images is None:
            return {t.name: np.zeros((count, *map(int, t.shape[1:])), dtype=t.dtype) for t in self.residuals}
        if len(self.images) not in (1, count):
            raise RequestError(
                f"control_image has {len(self.images)} pictures for {count} images; expected 1 or {count}"
            )
        rows = np.broadcast_to(self.images, (count, *self.images.shape[1:])).transpose(0, 3, 1, 2)
        pixels = np.ascontiguousarray(rows).astype(np.float32) / np.float32(255)
        return {CONTROL_IMAGE: pixels, CONTROL_SCALE: np.full(count, self.scale, dtype=np.float32)}


def steer(graphs: tuple[Graph, ...], image: object, scale: float | None) -> Steering:
    """Reads a control image.

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
        return Steering(graphs)
    if image is None:
        if scale is not None:
            raise RequestError("controlnet_conditioning_scale was given without a control_image; give one")
        return Steering(tuple(graph for graph in graphs if graph is not net), residuals=net.outputs)
    multiplied = 1.0 if scale is None else factor("controlnet_conditioning_scale", scale)
    (shape,) = (tensor.shape for tensor in net.inputs if tensor.name == CONTROL_IMAGE)
    height, width = map(int, shape[2:])
    return Steering(graphs, images_of(image, height, width, "control_image"), multiplied)
