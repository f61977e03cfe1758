"""Pictures that a request is given: of any mode and size from Pillow, or arrays of the size that is drawn.

A picture of another size is scaled until it covers the size that is drawn, and cut at both ends of the longer side; a
mask or a depth map that comes with it, in the same way.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.conditioning import as_array
from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.sessions import Array

# Pillow's name for a JPEG that further pictures follow, as many telephones write it: a thumbnail, a depth map.
BESIDE_A_PHOTOGRAPH = "MPO"
# How far Pillow's modes of more than 8 bits reach.
_DEEP = {"I;16": 65535.0, "I;16L": 65535.0, "I;16B": 65535.0, "I": 65535.0, "F": 1.0}
# Of red, green and blue in a grey pixel, of 2^16 (ITU-R 601-2, as Pillow rounds it).
_OF_GREY = (19595, 38470, 7471)
# Of the cubic that torch and OpenCV interpolate with.
_CUBIC = -0.75
_TAPS = 4
ONE_SIZE = "pictures of one size"


def open_picture(path: Path, name: str) -> Any:
    """Opens a file with Pillow: one picture, read in full, turned as its EXIF says.

    Args:
        name: What it is for, for messages.

    Raises:
        RequestError: It is missing, damaged, animated, of more pixels than Pillow reads (179 million), or of a format
            that it does not read.
    """
    from PIL import Image, ImageOps

    if path.is_dir():
        raise RequestError(f"{name} {path}: it is a folder; expected a picture")
    if not path.exists():
        raise RequestError(f"{name} {path}: there is no such file; check the path")
    try:
        # Pillow warns of what it reads nevertheless: large pictures, damaged metadata.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != BESIDE_A_PHOTOGRAPH:
                raise RequestError(f"{name} {path}: it holds {frames} pictures, as animations do; save one of them")
            return ImageOps.exif_transpose(opened.copy())
    except RequestError:
        raise
    except Image.DecompressionBombError as e:
        raise RequestError(f"{name} {path}: it has more pixels than Pillow reads ({one_line(e, 200)})") from e
    except Exception as e:  # what Pillow's readers raise for damaged files shares no base class
        raise RequestError(f"{name} {path}: it is damaged, or no picture that Pillow reads ({one_line(e, 200)})") from e


def edit_arguments(
    image: Path | None,
    mask: Path | None = None,
    depth: Path | None = None,
    control: Sequence[Path] = (),
    *,
    strength: float | None = None,
    image_guidance_scale: float | None = None,
    control_scale: Sequence[float] = (),
    paste: bool = False,
    feather: int = 0,
) -> dict[str, Any]:
    """What a command line says of an edit, as arguments of a generation; nothing where it says nothing.

    Raises:
        RequestError: A file cannot be opened.
    """
    files = {
        "--image": ("image", image),
        "--mask": ("mask_image", mask),
        "--depth": ("depth_map", depth),
    }
    found: dict[str, Any] = {
        argument: open_picture(path, option) for option, (argument, path) in files.items() if path is not None
    }
    numbers = {"strength": strength, "image_guidance_scale": image_guidance_scale, "paste": paste, "feather": feather}
    opened = [open_picture(path, "--control") for path in control]
    for name, given in (("control_image", opened), ("controlnet_conditioning_scale", list(control_scale))):
        if given:
            found[name] = given[0] if len(given) == 1 else given
    return found | {name: value for name, value in numbers.items() if value is not None}


def images_of(given: object, height: int, width: int, name: str = "image") -> NDArray[np.uint8]:
    """What ``image=``, or another argument of that `name`, holds: uint8 [N, height, width, 3].

    Args:
        given: A picture of Pillow's or a list of them, of any mode and size (what is transparent is laid on white);
            or uint8 [h, w], [h, w, C] or [N, h, w, C], C being 1 or 3.

    Raises:
        RequestError: It is something else, or an array of another size.
    """
    pictures = _pillows(given, name)
    if pictures:
        return np.stack([_rgb(_fitted(each, height, width, name)) for each in pictures])
    array = as_array(given, name, ONE_SIZE)
    told = _told(array)
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    wanted = f"expected uint8 [N, {height}, {width}, 3], or pictures of Pillow's, which are scaled"
    if array.dtype != np.uint8 or array.ndim != 4 or not len(array) or array.shape[3] not in (1, 3):
        raise RequestError(f"{name} is {told}; {wanted}")
    _check_size(name, array, height, width, wanted)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))


def as_shares(images: NDArray[np.uint8], channels: int) -> Array:
    """Pictures, uint8 [N, h, w, 3], as what draws by them is handed them: float32 [N, C, h, w], 0 to 1.

    Args:
        channels: 3, or 1 for a grey one, as Pillow's mode L.
    """
    if channels == 1:
        grey = (images.astype(np.uint32) @ np.array(_OF_GREY, np.uint32) + (1 << 15)) >> 16
        images = grey.astype(np.uint8)[..., None]
    shares: Array = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return shares


def masks_of(given: object, height: int, width: int, image: object) -> NDArray[np.bool_]:
    """What ``mask_image=`` holds, bool [N, height, width]: true where the picture is drawn anew.

    Args:
        given: Pictures of Pillow's, of the same size as those of `image`, of which half white and more counts; or
            bool, or uint8 with the same meaning, [h, w], [N, h, w] or [N, h, w, 1].

    Raises:
        RequestError: It is something else, of another size, or covers nothing.
    """
    pictures, images = _pillows(given, "mask_image"), _pillows(image, "image")
    if pictures:
        masks = []
        for i, each in enumerate(pictures):
            beside = images[min(i, len(images) - 1)] if images else each
            if beside.size != each.size:
                raise RequestError(
                    f"mask_image has {each.width} x {each.height} pixels, the image {beside.width} x {beside.height} "
                    "(width x height); expected the same"
                )
            masks.append(_grey(_fitted(each, height, width, "mask_image", nearest=True)) >= 0.5)
        found = np.stack(masks)
    else:
        found = as_array(given, "mask_image", ONE_SIZE)
        told = _told(found)
        found = found[..., 0] if found.ndim == 4 and found.shape[3] == 1 else found
        found = found[None] if found.ndim == 2 else found
        wanted = f"expected bool or uint8 [N, {height}, {width}], or pictures of Pillow's, which are scaled"
        if found.dtype not in (np.uint8, np.bool_) or found.ndim != 3 or not len(found):
            raise RequestError(f"mask_image is {told}; {wanted}")
        _check_size("mask_image", found, height, width, wanted)
        found = found >= 128 if found.dtype == np.uint8 else found
    if not found.any(axis=(1, 2)).all():
        raise RequestError("mask_image covers nothing; expected white where the picture is to be drawn anew")
    return found


def depths_of(given: object, height: int, width: int) -> Array:
    """What ``depth_map=`` holds, float32 [N, h, w] in any unit, the nearer the larger.

    Args:
        given: Pictures of Pillow's, scaled to `height` and `width`; or numbers [h, w] or [N, h, w] of any size.

    Raises:
        RequestError: It is something else, not finite, or the same everywhere.
    """
    pictures = _pillows(given, "depth_map")
    if pictures:
        found = np.stack([_grey(_fitted(each, height, width, "depth_map")) for each in pictures])
    else:
        found = as_array(given, "depth_map", ONE_SIZE)
        told = _told(found)
        found = found[None] if found.ndim == 2 else found
        if found.dtype.kind not in "iuf" or found.ndim != 3 or not found.size:
            raise RequestError(f"depth_map is {told}; expected numbers [N, h, w], larger where nearer")
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise RequestError("depth_map holds NaN or infinity; expected finite numbers")
    if (found.max(axis=(1, 2)) == found.min(axis=(1, 2))).any():
        raise RequestError("depth_map is the same everywhere; expected larger numbers where something is nearer")
    return found


def resized(maps: Array, height: int, width: int) -> Array:
    """float32 [N, h, w] at another size, as torch's ``interpolate(mode="bicubic")``: cubic, no smoothing before."""
    return _along(_along(maps, height, 1), width, 2)


def _along(maps: Array, size: int, axis: int) -> Array:
    have = maps.shape[axis]
    at = (np.arange(size) + 0.5) * (have / size) - 0.5
    below = np.floor(at)
    taps = below[:, None] + np.arange(-1, _TAPS - 1)
    away = np.abs(at[:, None] - taps)
    near = ((_CUBIC + 2) * away - (_CUBIC + 3)) * away**2 + 1
    far = ((away - 5) * away + 8) * away * _CUBIC - 4 * _CUBIC
    weights = np.where(away <= 1, near, far).astype(np.float32)
    taken = np.take(maps, np.clip(taps, 0, have - 1).astype(np.int64), axis=axis)
    shape = [1] * taken.ndim
    shape[axis : axis + 2] = weights.shape
    made: Array = (taken * weights.reshape(shape)).sum(axis=axis + 1, dtype=np.float32)
    return made


def _fitted(picture: Any, height: int, width: int, name: str, nearest: bool = False) -> Any:
    """A picture of this size: scaled until it covers it, what is over cut off at both ends."""
    from PIL import Image

    if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
        raise RequestError(f"{name} holds NaN or infinity; expected finite numbers")
    if picture.size == (width, height):
        return picture
    if min(picture.size) < 1:
        raise RequestError(f"{name} has no pixels; expected a picture")
    scale = max(width / picture.width, height / picture.height)
    left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
    right, bottom = min(left + width / scale, picture.width), min(top + height / scale, picture.height)
    box = (max(left, 0), max(top, 0), right, bottom)
    if picture.mode in _DEEP:
        picture = Image.fromarray(_grey(picture))
    elif not nearest:  # palettes and bits have no numbers between theirs
        picture = picture.convert("RGBA" if _is_transparent(picture) else "RGB")
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    return picture.resize((width, height), how, box=box)


def _rgb(picture: Any) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]; what is transparent is laid on white."""
    from PIL import Image

    if picture.mode in _DEEP:
        levels = np.clip(_grey(picture), 0, 1)
        return np.repeat(np.rint(255 * levels).astype(np.uint8)[..., None], 3, axis=2)
    if _is_transparent(picture):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _grey(picture: Any) -> Array:
    """float32 [h, w], white being 1."""
    if picture.mode in _DEEP:
        return np.asarray(picture, dtype=np.float32) / np.float32(_DEEP[picture.mode])
    if _is_transparent(picture):
        from PIL import Image

        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return np.asarray(picture.convert("L"), dtype=np.float32) / np.float32(255)


def _is_transparent(picture: Any) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def _pillows(given: Any, name: str) -> Sequence[Any]:
    """Pillow's pictures, one or a list of them; none where arrays were given, a RequestError for both in one list."""
    listed = given if isinstance(given, list | tuple) else [given]
    found = [each for each in listed if hasattr(each, "convert") and hasattr(each, "mode")]
    if found and len(found) < len(listed):
        raise RequestError(f"{name} has pictures of Pillow's and others in one list; expected one kind")
    return found


def _told(array: NDArray[Any]) -> str:
    return f"{array.dtype.name} {list(array.shape)}"


def _check_size(name: str, array: NDArray[Any], height: int, width: int, wanted: str) -> None:
    if array.shape[1:3] != (height, width):
        raise RequestError(f"{name} has {array.shape[2]} x {array.shape[1]} pixels (width x height); {wanted}")
