"""Editing: from the pictures of a request to where the loop begins, what the UNet sees of them, and what stays.

diffusers' arithmetic throughout (StableDiffusionImg2ImgPipeline, InpaintPipeline, InstructPix2PixPipeline,
Depth2ImgPipeline): strength, masks, scales and their order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.conditioning import factor, plain
from edgediff_runtime.errors import RequestError
from edgediff_runtime.loop import Kept
from edgediff_runtime.manifest import Concatenated, Graph, Sample, Vae
from edgediff_runtime.pictures import depths_of, images_of, masks_of, resized
from edgediff_runtime.samplers import Scheduler
from edgediff_runtime.sessions import Array, Session
from edgediff_runtime.text_encoding import run_one

# How much of the noise is added where a request does not say, without a mask and with one: diffusers' defaults.
STRENGTH = 0.8
STRENGTH_WITH_MASK = 1.0
IMAGE_GUIDANCE = 1.5
MAX_FEATHER = 256


@dataclass(frozen=True)
class Edit:
    """What a request says in pictures, checked.

    Attributes:
        takes: What of the UNet's concatenated channels is made of these pictures, in order.
        image: uint8 [1 or N, h, w, 3]; None where the request has no picture to begin with.
        mask: bool [1 or N, h, w], true where the picture is drawn anew; None: everywhere.
        depth: float32 [1 or N, H, W] of the latent's size, -1 (far) to 1 (near); None without one.
        strength: Share of the steps that are run, 0 to 1; 1 where there is no picture to begin with.
        image_guidance: Of a UNet that is guided by a picture too; None for others.
        feather: Width in pixels of the edge, inside of the mask, over which the new picture fades in.
        paste: Whether the finished picture has the image's own pixels outside of the mask.
    """

    takes: tuple[Concatenated, ...] = ()
    image: NDArray[np.uint8] | None = None
    mask: NDArray[np.bool_] | None = None
    depth: Array | None = None
    strength: float = 1.0
    image_guidance: float | None = None
    feather: int = 0
    paste: bool = False

    @property
    def count(self) -> int:
        """How many pictures the request has; 1 where one is for all images, or there are none."""
        return max(1 if each is None else len(each) for each in (self.image, self.mask, self.depth))

    @property
    def begins_with_noise(self) -> bool:
        """Whether nothing of the picture is in the latents that the loop begins with.

        As in diffusers: under a mask all of the noise is noise alone; without one, the picture shows through it.
        """
        return self.image is None or self.image_guidance is not None or (self.mask is not None and self.strength == 1)

    def check_count(self, count: int) -> None:
        """Refuses more than one picture, mask or depth map, and not one for each of so many images."""
        for name, given in (("image", self.image), ("mask_image", self.mask), ("depth_map", self.depth)):
            if given is not None and len(given) not in (1, count):
                raise RequestError(f"{name} has {len(given)} pictures for {count} images; expected 1 or {count}")

    def pasted(self, pixels: Array) -> Array:
        """A finished picture, float32 [N, 3, h, w], with the image's own pixels outside of the mask, if so asked."""
        if not self.paste or self.image is None or self.mask is None:
            return pixels
        alpha, own = feathered(self.mask, self.feather)[:, None], as_pixels(self.image)
        joined: Array = np.where(alpha > 0, alpha * pixels + (1 - alpha) * own, own)
        return joined


@dataclass(frozen=True)
class Beginning:
    """What the loop is given of an edit.

    Attributes:
        latents: Where it begins, [N, C, H, W].
        concat: Channels after the latent's, [N, C', H, W]; None where the UNet takes none.
        kept: What does not change; None where all may.
    """

    latents: Array
    concat: Array | None = None
    kept: Kept | None = None


def begin(
    edit: Edit,
    vae: Vae | None,
    scheduler: Scheduler,
    start: int,
    noise: Array,
    encode: Callable[[list[Array]], list[Array]],
) -> Beginning:
    """Where the loop begins, what the UNet sees beside the latent, and what stays.

    Args:
        vae: None where latents are pictures.
        start: First step that is run.
        noise: Standard normal, float32 [N, C, H, W].
        encode: From batches of pictures, float32 [1 or N, 3, h, w], to what the encoder gives, [1 or N, C, H, W].
    """
    count = len(noise)
    pure = noise * np.float32(scheduler.init_noise_sigma)
    if edit.image is None:
        return Beginning(pure, None if edit.depth is None else _rows([edit.depth[:, None]], count))
    pixels = as_pixels(edit.image)
    downscale = 1 if vae is None else vae.downscale
    masks = None if edit.mask is None else latent_mask(edit.mask, downscale)
    blends = masks is not None and "mask" not in edit.takes
    wanted = {}
    if blends or not edit.begins_with_noise:
        wanted["source"] = pixels
    if "image" in edit.takes:
        wanted["image"] = pixels
    if "masked_image" in edit.takes:
        assert edit.mask is not None
        wanted["masked_image"] = pixels * ~edit.mask[:, None]  # grey where it is drawn anew
    encoded = dict(zip(wanted, encode(list(wanted.values())), strict=True))
    scaled = {name: value if vae is None else from_vae(vae, value) for name, value in encoded.items()}
    latents, kept = pure, None
    if "source" in scaled:
        source = _rows([scaled["source"]], count)
        if not edit.begins_with_noise:
            latents = scheduler.add_noise(start, source, noise)
        if blends:
            assert masks is not None
            kept = Kept(masks, source, noise)
    beside = {"mask": masks, "masked_image": scaled.get("masked_image"), "image": encoded.get("image")}
    beside["depth"] = None if edit.depth is None else edit.depth[:, None]
    parts = [part for part in map(beside.get, edit.takes) if part is not None]
    return Beginning(latents, _rows(parts, count) if parts else None, kept)


def _rows(parts: list[Array], count: int) -> Array:
    """Channels one after the other, each for all images."""
    rows = [np.broadcast_to(part, (count, *part.shape[1:])) for part in parts]
    return np.ascontiguousarray(np.concatenate(rows, axis=1))


def read_edit(
    sample: Sample,
    size: tuple[int, int],
    downscale: int,
    *,
    image: object = None,
    mask_image: object = None,
    depth_map: object = None,
    strength: float | None = None,
    image_guidance_scale: float | None = None,
    paste: bool = False,
    feather: int = 0,
    concatenated: bool = False,
) -> Edit:
    """Checks what a request says in pictures against what the bundle's UNet takes.

    Args:
        size: Height and width of the latent.
        downscale: Pixels of a side for one of the latent.
        concatenated: Whether the request has the concatenated channels itself.

    Raises:
        RequestError: A picture is missing, not needed, or does not fit.
    """
    height, width = (downscale * side for side in size)
    paste, feather = plain(paste), plain(feather)
    if not isinstance(paste, bool):
        raise RequestError(f"paste is {paste!r}; expected True or False")
    if isinstance(feather, bool) or not isinstance(feather, int) or not 0 <= feather <= MAX_FEATHER:
        raise RequestError(f"feather is {feather!r}; expected a whole number from 0 to {MAX_FEATHER}, in pixels")
    takes = () if concatenated else sample.concat
    _must_come("image", image, "image" in takes or "masked_image" in takes, takes)
    _must_come("mask_image", mask_image, "mask" in takes, takes)
    _must_come("depth_map", depth_map, "depth" in takes, takes)
    if depth_map is not None and "depth" not in takes:
        raise RequestError("depth_map was given, but the bundle's UNet takes no depth; leave it out")
    if image is None:
        for name, given in (("mask_image", mask_image), ("strength", strength)):
            if given is not None:
                raise RequestError(f"{name} was given without an image; give image= (--image) too")
    if mask_image is None and (paste or feather):
        raise RequestError(f"{'paste' if paste else 'feather'} was given without a mask; give mask_image= (--mask) too")
    if feather and not paste:
        raise RequestError("feather was given, but nothing is pasted; give paste=True (--paste) too")
    instructed = "image" in takes
    if instructed and mask_image is not None:
        raise RequestError(
            "mask_image was given, but the bundle's UNet follows instructions for the whole picture; leave it out"
        )
    if instructed and strength is not None:
        raise RequestError(
            "strength was given, but the bundle's UNet sees the image in every step and begins from noise; "
            "give image_guidance_scale= (--image-guidance-scale)"
        )
    if image_guidance_scale is not None and not instructed:
        raise RequestError(
            "image_guidance_scale was given, but the bundle's UNet is not guided by an image; leave it out"
        )
    chosen = strength
    if chosen is None:
        chosen = 1.0 if image is None or instructed else STRENGTH if mask_image is None else STRENGTH_WITH_MASK
    images = None if image is None else images_of(image, height, width)
    masks = None if mask_image is None else masks_of(mask_image, height, width, image)
    if masks is not None and not masks[:, ::downscale, ::downscale].any(axis=(1, 2)).all():
        raise RequestError(
            f"mask_image is too thin: no pixel of it is left at the latent's size; expected {downscale} pixels or more"
        )
    depth = None
    if depth_map is not None:
        depth = resized(depths_of(depth_map, height, width), *size)
        low, high = (each(axis=(1, 2), keepdims=True) for each in (depth.min, depth.max))
        if (low == high).any():
            raise RequestError("depth_map is the same everywhere at the latent's size; expected a coarser one")
        depth = 2 * (depth - low) / (high - low) - 1
    guidance = None
    if instructed:
        guidance = (
            IMAGE_GUIDANCE if image_guidance_scale is None else factor("image_guidance_scale", image_guidance_scale)
        )
    return Edit(takes, images, masks, depth, chosen, guidance, feather, paste)


def _must_come(name: str, given: object, needed: bool, takes: tuple[Concatenated, ...]) -> None:
    if needed and given is None:
        option = {"image": "--image", "mask_image": "--mask", "depth_map": "--depth"}[name]
        raise RequestError(f"the bundle's UNet takes {in_words(takes)} beside the latent; give {name}= ({option})")


def in_words(takes: tuple[Concatenated, ...]) -> str:
    """What is concatenated to the latent, for messages."""
    return " and ".join(takes).replace("_", " ")


def steps_left_out(strength: float, num_inference_steps: int) -> int:
    """How many steps an edit leaves out at the beginning, as diffusers counts them.

    Raises:
        RequestError: The strength is not 0 to 1, or leaves no step.

    >>> steps_left_out(0.6, 8), steps_left_out(1.0, 8)
    (4, 0)
    """
    value = plain(strength)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError(f"strength is {strength!r}; expected 0 (nothing changes) to 1")
    run = min(int(num_inference_steps * value), num_inference_steps)
    if run < 1:
        raise RequestError(
            f"strength is {value:g}: of {num_inference_steps} step{'s' * (num_inference_steps != 1)} it leaves none; "
            f"expected {1 / num_inference_steps:g} or more, or more steps"
        )
    return num_inference_steps - run


def as_pixels(images: NDArray[np.uint8]) -> Array:
    """uint8 [N, h, w, 3] as float32 [N, 3, h, w], -1 to 1; `to_uint8` makes the same bytes of them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def encode(session: Session, graph: Graph, pixels: Array) -> Array:
    """Encodes pictures, float32 [N, 3, h, w], one at a time: the mean of what the encoder gives, [N, C, H, W].

    diffusers draws from the distribution around that mean, whose spread in Stable Diffusion is a few thousandths.
    """
    made = []
    for i in range(len(pixels)):
        (output,) = run_one(session, graph, {graph.inputs[0].name: pixels[i : i + 1]}).items()
        name, value = output
        made.append(value[:, : value.shape[1] // 2] if name == "latent_parameters" else value)
    return np.concatenate(made)


def from_vae(vae: Vae, latents: Array) -> Array:
    """What the encoder gives as the loop takes it, float32 [N, C, H, W]: the reverse of `decoding.to_vae`."""
    if vae.mean is not None and vae.std is not None:
        mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (vae.mean, vae.std))
        moved: Array = (latents - mean) * np.float32(vae.scaling_factor) / std
        return moved
    return latents * np.float32(vae.scaling_factor)


def latent_mask(masks: NDArray[np.bool_], downscale: int) -> Array:
    """Masks [N, h, w] at the latent's size, float32 [N, 1, H, W]: each square's upper left pixel, as in diffusers."""
    return np.ascontiguousarray(masks[:, None, ::downscale, ::downscale]).astype(np.float32)


def feathered(masks: NDArray[np.bool_], pixels: int) -> Array:
    """How much of the new picture shows, float32 [N, h, w]: 0 outside of the mask, 1 where its edge is far enough away.

    Each of `pixels` rings, from the mask's edge inwards, shows more, in equal steps; the picture's edge is none.
    """
    inside = masks
    total = masks.astype(np.float32)
    for _ in range(pixels):
        wide = np.pad(inside, ((0, 0), (1, 1), (1, 1)), constant_values=True)
        rows = wide[:, :-2] & wide[:, 1:-1] & wide[:, 2:]
        inside = rows[:, :, :-2] & rows[:, :, 1:-1] & rows[:, :, 2:]
        total += inside
    return total / np.float32(pixels + 1)
