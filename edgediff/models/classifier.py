"""A small convolutional classifier, whose features are used to compare images.

Networks trained on ImageNet expect 224 or 299 pixels and have licences of their own; a network trained on one kind of
small images distinguishes those better. Its distances compare with each other, not with published ones. Features are
normalised over the training images: the unit of a distance is one standard deviation.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from edgediff.data.batches import as_channels_first, scaled
from edgediff.data.image_folder import ImageSet
from edgediff.errors import DataError, ModelError
from edgediff.models.model_files import fill, read_tensors
from edgediff.zoo import FOLDER
from edgediff_runtime.errors import one_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Within a built-in model's folder.
BESIDE_THE_MODEL = "classifier"
_BATCH = 250

Count = Annotated[int, Meta(ge=1, le=4096)]


class ClassifierShape(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="_class_name",
    tag="Classifier",
):
    """A classifier's config.json.

    Attributes:
        size: Height and width of its images, in pixels.
        widths: Channels of each level; all but the first halve the map. The last is the number of features.
        styles: What a second head tells apart; none has no such head.
        stride: Of the first convolution.
    """

    size: Count
    widths: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=8)]
    labels: Annotated[tuple[str, ...], Meta(min_length=1)]
    styles: tuple[str, ...] = ()
    stride: Annotated[int, Meta(ge=1, le=4)] = 1


class Classifier(nn.Module):
    """Levels of two convolutions, the mean over the map, a normalisation, and a linear layer on top for each head."""

    def __init__(self, shape: ClassifierShape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = _convolution(3, shape.widths[0], shape.stride)
        before = (shape.widths[0], *shape.widths)
        self.levels = nn.ModuleList(
            _Level(channels, width, halves=i > 0)
            for i, (channels, width) in enumerate(zip(before, shape.widths, strict=False))
        )
        self.norm = nn.BatchNorm1d(shape.widths[-1], affine=False)
        self.head = nn.Linear(shape.widths[-1], len(shape.labels))
        self.style_head = nn.Linear(shape.widths[-1], len(shape.styles)) if shape.styles else None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """From float32 [B, 3, H, W] in [-1, 1] to the last layer's input, float32 [B, F], F the last width."""
        x = self.stem(images)
        for level in self.levels:
            x = level(x)
        features: torch.Tensor = self.norm(x.mean(dim=(2, 3)))
        return features

    def heads(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From features [B, F] to the logits of the labels, [B, K], and of the styles, [B, S], where there are any."""
        found = (self.head, self.style_head)
        return tuple(head(features) for head in found if head is not None)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From float32 [B, 3, H, W] in [-1, 1] to what `heads` gives."""
        return self.heads(self.features(images))


class _Level(nn.Module):
    """Optionally halves the map and changes the width; then a convolution with a residual."""

    def __init__(self, channels: int, width: int, halves: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if halves else nn.Identity()
        self.widen = _convolution(channels, width) if halves else nn.Identity()
        self.residual = _convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.widen(x))
        residual: torch.Tensor = self.residual(x)
        return x + residual


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def as_input(images: NDArray[np.uint8]) -> torch.Tensor:
    """From uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return scaled(as_channels_first(images))


@torch.no_grad()
def features_of(classifier: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The features of images, uint8 [N, H, W, 3], as float64 [N, F]; computed on the classifier's device."""
    device = classifier.head.weight.device
    chunks = (as_input(images[i : i + _BATCH]).to(device) for i in range(0, len(images), _BATCH))
    return torch.cat([classifier.features(chunk) for chunk in chunks]).cpu().double().numpy()


@torch.no_grad()
def scores_of(classifier: Classifier, features: NDArray[np.float64]) -> tuple[NDArray[np.float32], ...]:
    """What each head says of features, [N, F]: float32 [N, K] of the labels, [N, S] of the styles, if any."""
    given = torch.from_numpy(features).float().to(classifier.head.weight.device)
    return tuple(scores.cpu().numpy() for scores in classifier.heads(given))


def ranks_of(scores: NDArray[np.float32], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each wanted class, int64 [N], by its score among all, [N, K]; the first is 1."""
    ranks: NDArray[np.int64] = 1 + (scores > np.take_along_axis(scores, wanted[:, None], 1)).sum(axis=1)
    return ranks


@torch.no_grad()
def accuracy_of(classifier: Classifier, data: ImageSet) -> float:
    """Share of the images, 0 to 1, whose class has the highest score; a DataError for a class that it does not know."""
    known = classifier.shape.labels
    strange = [name for name in data.names if name not in known]
    if strange:
        raise DataError(f"class {strange[0]!r} is not one of the classifier's; choices: {', '.join(known)}")
    wanted = torch.tensor([known.index(name) for name in data.names])[torch.from_numpy(data.labels)]
    chunks = torch.split(as_input(data.images), _BATCH)
    return float((torch.cat([classifier(chunk)[0].argmax(1) for chunk in chunks]) == wanted).float().mean())


def save_classifier(classifier: Classifier, folder: str | Path) -> None:
    """Writes config.json and, in fp16, model.safetensors; makes the folder if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in classifier.state_dict().items()
    }
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(classifier.shape), indent=1) + b"\n")


def load_classifier(folder: str | Path) -> Classifier:
    """Reads what `save_classifier` wrote, in float32 and evaluation mode; a ModelError if it is missing or damaged."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"no classifier at {folder}: {name} is missing")
    with torch.device("meta"):
        classifier = Classifier(_read_shape(folder))
    state = read_tensors(folder / WEIGHTS)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    fill(classifier, state, folder / WEIGHTS, CONFIG)
    return classifier.eval().requires_grad_(False)


def built_in_classifier(labels: tuple[str, ...] | None, size: int) -> Path:
    """The folder of a built-in classifier that knows these classes, for size x size pixels; or a ModelError."""
    for path in sorted(FOLDER.glob(f"*/{BESIDE_THE_MODEL}/{CONFIG}")):
        shape = _read_shape(path.parent)
        if shape.size == size and labels and set(labels) <= set(shape.labels):
            return path.parent
    raise ModelError(
        f"no features: no built-in classifier knows these {len(labels or ())} classes at {size}x{size}; "
        "name the folder of one (--features)"
    )


def _read_shape(folder: Path) -> ClassifierShape:
    try:
        return msgspec.json.decode((folder / CONFIG).read_bytes(), type=ClassifierShape)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ModelError(f"{folder / CONFIG} does not describe a classifier: {one_line(e)}") from e
