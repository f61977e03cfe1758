"""Training of the classifier whose features tell image sets apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import msgspec
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from edgediff.config.strict import check_ranges
from edgediff.data.image_folder import ImageSet
from edgediff.errors import ConfigError, DataError
from edgediff.models.classifier import Classifier, ClassifierShape, as_input
from edgediff.train.loop import LOSS, Loop, Task, cosine

_WARM_UP = 100
_SHIFT = 3
_LIGHT = 0.1
# How far `distort` goes: scale and slant, position and waves (shares of the picture), blur (pixels), noise, colour.
_SCALE, _SLANT, _PLACE, _WAVE = 0.15, 0.12, 0.08, 0.05
_BLUR, _NOISE, _COLOUR = 1.6, 0.12, 0.15
STYLE = "style"
_STYLE_WEIGHT = 0.3


class ClassifierRecipe(msgspec.Struct, frozen=True):
    """How a classifier is trained.

    Attributes:
        widths: Channels of each level; every level but the first halves the map. The last is the number of features.
        epochs: Passes over the images at most.
        minutes: Wall-clock time at most, by which the learning rate falls to 0 too; the weights then differ from run
            to run. None sets no bound.
        label_smoothing: Share of the target that is spread over all classes; it bounds the features.
        distorts: Images are distorted as generated ones are, by `distort`, and not only mirrored, shifted and lit.
    """

    widths: tuple[int, ...] = (24, 48, 96, 128)
    stride: int = 1
    distorts: bool = False
    epochs: int = 30
    minutes: float | None = None
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """The result of a training: `loss` is the mean over the last epoch, which may be incomplete where time ended it."""

    classifier: Classifier
    epochs: int
    steps: int
    loss: float


def train_classifier(
    data: ImageSet,
    recipe: ClassifierRecipe | None = None,
    progress: Callable[[str], None] = lambda what: None,
    styles: Sequence[str] = (),
) -> Trained:
    """Trains a classifier of square images: cross-entropy, AdamW, cosine decay; images are augmented.

    The same images, recipe, versions and number of threads give the same weights. `progress` is called once an epoch;
    `styles` are what a second head learns, one of each image, or none.

    Raises:
        ConfigError: A number of the recipe is out of range.
        DataError: There are fewer images than a step takes, or fewer than two classes.
        TrainingError: The loss is not finite.
    """
    recipe = ClassifierRecipe() if recipe is None else recipe
    check_ranges(recipe, ("epochs", "batch", "learning_rate", "minutes", "stride"))
    if recipe.batch < 2:  # batch normalisation has no variance of one image
        raise ConfigError("'batch' is 1; expected 2 or more")
    if len(data.names) < 2 or len(data) < recipe.batch:
        raise DataError(
            f"{len(data)} images of {len(data.names)} classes; expected two classes and {recipe.batch} images or more"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        known = tuple(sorted({*styles}))
        shape = ClassifierShape(data.images.shape[1], recipe.widths, data.names, known, recipe.stride)
        classifier = Classifier(shape)
    targets = [torch.from_numpy(data.labels)]
    if styles:
        targets.append(torch.tensor([known.index(style) for style in styles]))
    task = _ClassifierTask(Accelerator(), classifier, data, torch.stack(targets), recipe, progress)
    Loop(task).run()
    return Trained(
        classifier=classifier.requires_grad_(False).cpu(),
        epochs=math.ceil(task.state.updates / task.per_epoch),
        steps=task.state.updates,
        loss=task.last_epoch(),
    )


class _ClassifierTask(Task):
    """A visit is one update. All random draws come from one generator, so a training cannot be resumed."""

    def __init__(
        self,
        accelerator: Accelerator,
        classifier: Classifier,
        data: ImageSet,
        targets: torch.Tensor,
        recipe: ClassifierRecipe,
        progress: Callable[[str], None],
    ) -> None:
        """Takes also the targets, int64 [1 or 2, N]: of the labels, and of the styles where there are any."""
        self.per_epoch = len(data) // recipe.batch
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=recipe.weight_decay)
        super().__init__(accelerator, recipe, classifier, optimizer, classifier, recipe.epochs * self.per_epoch)
        self.weights = {LOSS: 1.0, STYLE: _STYLE_WEIGHT}
        self.images, self.targets = as_input(data.images), targets
        self.progress = progress
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.order = torch.empty(0)
        self.start = monotonic()

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        recipe, place = self.settings, batch % self.per_epoch
        if place == 0:
            self.order = torch.randperm(len(self.images), generator=self.rng)
        rows = self.order[recipe.batch * place :][: recipe.batch]
        images = augment(self.images[rows], self.rng)
        images = distort(images, self.rng) if recipe.distorts else images
        heads = model(images.to(self.device))
        targets = self.targets[:, rows].to(self.device)
        losses = [
            F.cross_entropy(scores, wanted, label_smoothing=recipe.label_smoothing)
            for scores, wanted in zip(heads, targets, strict=True)
        ]
        return dict(zip((LOSS, STYLE), losses, strict=False))

    def _spent(self) -> float:
        """The share of the time that is spent."""
        minutes = self.settings.minutes
        return 0.0 if minutes is None else (monotonic() - self.start) / (60 * minutes)

    def is_over(self) -> bool:
        return self.state.updates > 0 and self._spent() >= 1

    def rate(self, update: int, total: int) -> float:
        return cosine(min(max(update / total, self._spent()), 1)) * min((update + 1) / _WARM_UP, 1)

    def last_epoch(self) -> float:
        """Mean loss over the last epoch's updates."""
        last = self.state.losses[-self.per_epoch :]
        return sum(last) / len(last)

    def after_visit(self, loop: Loop) -> None:
        done = self.state.updates
        if done % self.per_epoch == 0:
            self.progress(f"epoch {done // self.per_epoch} of {self.settings.epochs}: loss {self.last_epoch():.3f}")


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Light changes that leave an image's class as it is; float32 [B, 3, H, W] in [-1, 1], H and W above 3.

    Half of them are mirrored, all are shifted by up to 3 pixels (one shift for the batch), contrast and brightness are
    changed by up to a tenth.
    """
    count, _, height, width = images.shape
    mirrored = torch.rand(count, 1, 1, 1, generator=rng) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, right = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=rng).tolist()
    padded = F.pad(images, (_SHIFT,) * 4, mode="reflect")
    images = padded[:, :, down : down + height, right : right + width]
    contrast, brightness = _LIGHT * (2 * torch.rand(2, count, 1, 1, 1, generator=rng) - 1)
    lit: torch.Tensor = images * (1 + contrast) + brightness
    return lit


def distort(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """What a generator and its decoder do to drawings, each image another way; float32 [B, 3, H, W] in [-1, 1].

    Drawings are scaled, slanted, moved and bent in waves; half of them are blurred; noise is added, and each channel
    is scaled by up to 15 %. What comes in from outside repeats the edge.
    """
    count, _, height, width = images.shape

    def drawn(scale: float, *shape: int) -> torch.Tensor:
        return scale * (2 * torch.rand(*shape, generator=rng) - 1)

    theta = torch.eye(2, 3) + drawn(1, count, 2, 3) * torch.tensor(
        [[_SCALE, _SLANT, 2 * _PLACE], [_SLANT, _SCALE, 2 * _PLACE]]
    )
    waves = F.interpolate(drawn(2 * _WAVE, count, 2, 4, 4), (height, width), mode="bicubic", align_corners=True)
    places = F.affine_grid(theta, [count, 1, height, width], align_corners=False) + waves.permute(0, 2, 3, 1)
    images = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    images = _blurred(images, (drawn(_BLUR, count) * (drawn(1, count) > 0)).abs())
    noise = torch.randn(images.shape, generator=rng) * drawn(_NOISE, count, 1, 1, 1)
    # White stays white: colours are scaled as seen from there.
    images = 1 + (images - 1) * (1 + drawn(_COLOUR, count, 3, 1, 1))
    return (images + noise).clamp(-1, 1)


def _blurred(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Images under a Gaussian of each one's width in pixels, float32 [B]; 0 leaves one as it is."""
    count, channels, height, width = images.shape
    reach = math.ceil(3 * _BLUR)
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    rows = F.pad(images, (reach,) * 4, mode="replicate").reshape(1, count * channels, height + 2 * reach, -1)
    for kernel in (taps[:, None, :, None], taps[:, None, None, :]):
        rows = F.conv2d(rows, kernel, groups=count * channels)
    return rows.reshape(count, channels, height, width)
