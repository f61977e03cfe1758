"""A control image: what a ControlNet or a T2I-Adapter is handed, or the zeros that stand for what it would make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.conditioning import arrays, factor, rows_of
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import CONTROL_IMAGE, CONTROL_SCALE, CONTROLNET, Graph, Tensor, feature_tensors
from edgediff_runtime.pictures import as_shares, images_of
from edgediff_runtime.sessions import Array

SCALE = "controlnet_conditioning_scale"


@dataclass(frozen=True)
class Steering:
    """What a request says of control, checked.

    Attributes:
        graphs: Those that run: the ControlNet only where there is a control image.
        images: uint8 [1 or N, h, w, 3]; None where nothing steers.
        scale: What residuals, or features, are multiplied by.
        residuals: Those that the UNet takes and nothing makes.
        features: A T2I-Adapter's, which the UNet takes and a component makes of the images.
        channels: Of the picture that this component takes.
        given: Features that the request has itself, by their names.
    """

    graphs: tuple[Graph, ...]
    images: NDArray[np.uint8] | None = None
    scale: float = 1.0
    residuals: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()
    channels: int = 3
    given: Mapping[str, Array] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many control images there are; 1 where one is for all images, or there are none."""
        rows = (len(each) for each in self.given.values() if each.ndim)
        return max(rows, default=1) if self.images is None else len(self.images)

    def tensors(self, count: int, adapt: Callable[[Array], dict[str, Array]]) -> dict[str, Array]:
        """What the graphs are handed for so many images, [count, ...] by name.

        Args:
            adapt: What makes features [N, C, H, W] by name of pictures, float32 [N, C, h, w] of 0 to 1.

        Raises:
            RequestError: There is more than one control image, and not one for each.
        """
        if self.images is None and not self.given:
            return {t.name: np.zeros((count, *map(int, t.shape[1:])), dtype=t.dtype) for t in self.residuals}
        if self.images is not None and len(self.images) not in (1, count):
            raise RequestError(
                f"control_image has {len(self.images)} pictures for {count} images; expected 1 or {count}"
            )
        if self.features:
            made = dict(self.given) if self.images is None else adapt(as_shares(self.images, self.channels))
            scaled = {name: value * np.float32(self.scale) for name, value in made.items()}
            return rows_of({tensor.name: tensor for tensor in self.features}, scaled, count, "")
        assert self.images is not None
        pixels = as_shares(np.broadcast_to(self.images, (count, *self.images.shape[1:])), self.channels)
        return {CONTROL_IMAGE: pixels, CONTROL_SCALE: np.full(count, self.scale, dtype=np.float32)}


def steer(
    graphs: tuple[Graph, ...],
    image: object,
    scale: float | None,
    features: object = None,
    adapter: Callable[[], Graph] | None = None,
) -> Steering:
    """Reads a control image.

    Args:
        graphs: The UNet's, for the size that is drawn.
        image: As `images_of` takes it, of the picture's size; None draws without it, and nothing of it runs.
        scale: What residuals or features are multiplied by; None is 1.
        features: A T2I-Adapter's by their names, made before, instead of an image.
        adapter: The T2I-Adapter's graph for the size that is drawn; None where there is none.

    Raises:
        RequestError: Nothing takes a control image, or the image, the features or the scale do not fit.
    """
    net = next((graph for graph in graphs if graph.name == CONTROLNET), None)
    taken = feature_tensors(graphs)
    if features is not None and (not taken or image is not None):
        why = "a control_image" if taken else "the bundle was exported without a T2I-Adapter"
        raise RequestError(f"control_features were given, and {why}; leave them out")
    if net is None and not taken:
        if image is not None:
            raise RequestError(
                "control_image was given, but the bundle has neither a ControlNet nor a T2I-Adapter; leave it out, or "
                "export with --control DIR or --t2i-adapter DIR"
            )
        if scale is not None:
            raise RequestError(f"{SCALE} was given, but there is no ControlNet and no T2I-Adapter; leave it out")
        return Steering(graphs)
    if image is None and features is None:
        if scale is not None:
            raise RequestError(f"{SCALE} was given without a control_image; give one")
        without = tuple(graph for graph in graphs if graph is not net)
        return Steering(without, residuals=taken if net is None else net.outputs)
    multiplied = 1.0 if scale is None else factor(SCALE, scale)
    if image is None:
        return Steering(graphs, scale=multiplied, features=taken, given=arrays(None, features, "control_features: "))
    if net is None and adapter is None:
        raise RequestError(
            "control_image was given, but the bundle has no t2i_adapter for this backend; export it with that component"
        )
    drawn = net if adapter is None else adapter()
    assert drawn is not None
    (shape,) = (tensor.shape for tensor in drawn.inputs if tensor.name == CONTROL_IMAGE)
    channels, height, width = map(int, shape[1:])
    return Steering(
        graphs, images_of(image, height, width, CONTROL_IMAGE), multiplied, features=taken, channels=channels
    )
