"""Training of the classifier whose features tell image sets apart."""

import math
from collections.abc import Callable
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


class ClassifierRecipe(msgspec.Struct, frozen=True):
    """How a classifier is trained.

    Attributes:
        widths: Channels of each level; every level but the first halves the map. The last is the number of features.
        epochs: Passes over the images at most.
        minutes: Wall-clock time at most, by which the learning rate falls to 0 too; the weights then differ from run
            to run. None sets no bound.
        label_smoothing: Share of the target that is spread over all classes; it bounds the features.
    """

    widths: tuple[int, ...] = (24, 48, 96, 128)
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
    data: ImageSet, recipe: ClassifierRecipe | None = None, progress: Callable[[str], None] = lambda what: None
) -> Trained:
    """Trains a classifier of square images: cross-entropy, AdamW, cosine decay; images are augmented.

    The same images, recipe, versions and number of threads give the same weights. `progress` is called once an epoch.

    Raises:
        ConfigError: A number of the recipe is out of range.
        DataError: There are fewer images than a step takes, or fewer than two classes.
        TrainingError: The loss is not finite.
    """
    recipe = ClassifierRecipe() if recipe is None else recipe
    check_ranges(recipe, ("epochs", "batch", "learning_rate", "minutes"))
    if recipe.batch < 2:  # batch normalisation has no variance of one image
        raise ConfigError("'batch' is 1; expected 2 or more")
    if len(data.names) < 2 or len(data) < recipe.batch:
        raise DataError(
            f"{len(data)} images of {len(data.names)} classes; expected two classes and {recipe.batch} images or more"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = Classifier(ClassifierShape(data.images.shape[1], recipe.widths, data.names))
    task = _ClassifierTask(Accelerator(), classifier, data, recipe, progress)
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
        recipe: ClassifierRecipe,
        progress: Callable[[str], None],
    ) -> None:
        self.per_epoch = len(data) // recipe.batch
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=recipe.weight_decay)
        super().__init__(accelerator, recipe, classifier, optimizer, classifier, recipe.epochs * self.per_epoch)
        self.images, self.labels = as_input(data.images), torch.from_numpy(data.labels)
        self.progress = progress
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.order = torch.empty(0)
        self.start = monotonic()

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        recipe, place = self.settings, batch % self.per_epoch
        if place == 0:
            self.order = torch.randperm(len(self.images), generator=self.rng)
        rows = self.order[recipe.batch * place :][: recipe.batch]
        scores = model(augment(self.images[rows], self.rng).to(self.device))
        labels = self.labels[rows].to(self.device)
        return {LOSS: F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)}

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
