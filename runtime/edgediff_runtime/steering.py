"""A control image: what a ControlNet or a T2I-Adapter is handed, or the zeros that stand for what it would make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.conditioning import arrays, factor, repeated, rows_of
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import (
    CONTROL_IMAGE,
    CONTROL_SCALE,
    CONTROLNET,
    Graph,
    Tensor,
    feature_tensors,
    numbered,
)
from edgediff_runtime.pictures import as_shares, images_of
from edgediff_runtime.sessions import Array

SCALE = "controlnet_conditioning_scale"


@dataclass(frozen=True)
class Picture:
    """What one ControlNet or T2I-Adapter draws by.

    Attributes:
        name: In the request.
        images: uint8 [1 or N, h, w, 3].
        scale: What residuals, or features, are multiplied by.
        channels: What it takes of each image.
    """

    name: str
    images: NDArray[np.uint8]
    scale: float
    channels: int

    def rows(self, count: int) -> Array:
        """The picture of each of so many images, float32 [count, C, h, w]; one picture for all is one row."""
        if len(self.images) not in (1, count):
            raise RequestError(f"{self.name} has {len(self.images)} pictures for {count} images; expected 1 or {count}")
        return as_shares(self.images, self.channels)


@dataclass(frozen=True)
class Steering:
    """What a request says of control, checked.

    Attributes:
        graphs: Those that run: the ControlNet only where there is a control image.
        pictures: Those of each ControlNet, or of the T2I-Adapter; empty where nothing steers.
        residuals: Those that the UNet takes and nothing makes.
        features: A T2I-Adapter's, which the UNet takes and a component makes of the picture.
        given: Features that the request has itself, by their names; multiplied by its scale already.
    """

    graphs: tuple[Graph, ...]
    pictures: tuple[Picture, ...] = ()
    residuals: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()
    given: Mapping[str, Array] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many control images there are; 1 where one is for all images, or there are none."""
        rows = (len(each) for each in self.given.values() if each.ndim)
        return max([*rows, *(len(each.images) for each in self.pictures)], default=1)

    def tensors(self, count: int, adapt: Callable[[Array], dict[str, Array]]) -> dict[str, Array]:
        """What the graphs are handed for so many images, [count, ...] by name.

        Args:
            adapt: What makes features [N, C, H, W] by name of pictures, float32 [N, C, h, w] of 0 to 1.

        Raises:
            RequestError: There is more than one control image, and not one for each.
        """
        needed = {tensor.name: tensor for tensor in self.features}
        if self.given:
            return rows_of(needed, self.given, count, "")
        if self.features:
            (picture,) = self.pictures
            return rows_of(needed, _scaled(adapt(picture.rows(count)), picture.scale), count, "")
        found: dict[str, Array] = {}
        for i, picture in enumerate(self.pictures):
            found[numbered(CONTROL_IMAGE, i)] = repeated(picture.rows(count), count)
            found[numbered(CONTROL_SCALE, i)] = np.full(count, picture.scale, dtype=np.float32)
        zeros = {t.name: np.zeros((count, *map(int, t.shape[1:])), dtype=t.dtype) for t in self.residuals}
        return found | zeros


def _scaled(features: Mapping[str, Array], scale: float) -> dict[str, Array]:
    return {name: value * np.float32(scale) for name, value in features.items()}


def steer(
    graphs: tuple[Graph, ...],
    image: object,
    scale: object,
    features: object = None,
    adapter: Callable[[], Graph] | None = None,
) -> Steering:
    """Reads a control image, or a list with one for each of several ControlNets.

    Args:
        graphs: The UNet's, for the size that is drawn.
        image: As `images_of` takes it, of the picture's size; None draws without it, and nothing of it runs. Of several
            ControlNets a list, where None leaves one out.
        scale: What residuals or features are multiplied by; None is 1. Of several ControlNets also a list.
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
    if image is None:
        multiplied = 1.0 if scale is None else factor(SCALE, scale)
        given = _scaled(arrays(None, features, "control_features: "), multiplied)
        return Steering(graphs, features=taken, given=given)
    if net is None and adapter is None:
        raise RequestError(
            "control_image was given, but the bundle has no t2i_adapter for this backend; export it with that component"
        )
    drawn = net if adapter is None else adapter()
    assert drawn is not None
    places = [tensor for tensor in drawn.inputs if tensor.name.startswith(CONTROL_IMAGE)]
    if len(places) == 1:
        return Steering(graphs, (_picture(places[0], CONTROL_IMAGE, image, scale),), features=taken)
    images = _one_each(image, CONTROL_IMAGE, len(places))
    scales = _one_each(scale, SCALE, len(places)) if isinstance(scale, list | tuple) else [scale] * len(places)
    pictures = tuple(
        _picture(place, f"{CONTROL_IMAGE}[{i}]", each, own)
        for i, (place, each, own) in enumerate(zip(places, images, scales, strict=True))
    )
    if all(each is None for each in images):
        return Steering(tuple(graph for graph in graphs if graph is not net), residuals=drawn.outputs)
    return Steering(graphs, pictures)


def _one_each(given: object, name: str, count: int) -> Sequence[object]:
    """What a request says of each of several ControlNets."""
    if not isinstance(given, list | tuple) or len(given) != count:
        told = f"has {len(given)} entries" if isinstance(given, list | tuple) else "is for one ControlNet"
        raise RequestError(f"{name} {told}, and the bundle has {count}; expected a list of {count}")
    return given


def _picture(place: Tensor, name: str, image: object, scale: object) -> Picture:
    """What a ControlNet or an adapter is handed, where None leaves one of several out: nothing, multiplied by 0."""
    channels, height, width = map(int, place.shape[1:])
    multiplied = 1.0 if scale is None else factor(SCALE, scale)
    if image is None:
        return Picture(name, np.zeros((1, height, width, 3), np.uint8), 0.0, channels)
    return Picture(name, images_of(image, height, width, name), multiplied, channels)
