"""Images in large numbers, whatever fits into memory at once and on however many processes.

A pipeline numbers its noise from 0 in each call. Here a call is a chunk of a longer row of images, so noise is drawn by
the image's number in the whole row: image i is the same for any size of chunk and any number of processes (but for
rounding, where a backend adds up in another order), and is what `edgediff run` makes of the same seed and class as its
image i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.evaluate.sampler import Sampler
from edgediff_runtime import denoise, make_scheduler, noise
from edgediff_runtime.image import to_uint8
from edgediff_runtime.loop import Request


@dataclass(frozen=True, eq=False)
class Row:
    """A row of images, any of which can be made at any time.

    Attributes:
        sampler: What makes them; its `check` has seen what is asked for.
        num_images: How many there are.
        classes: int64 [num_images]; None where there is no condition.
        guidance_scale: Classifier-free guidance; 1 is off.
        seed: 0 to 2^64 - 1.
    """

    sampler: Sampler
    num_images: int
    classes: NDArray[np.int64] | None
    guidance_scale: float
    seed: int

    def chunks(self, batch: int) -> list[range]:
        """Divides the row.

        Args:
            batch: Images of each piece, the last of which may be smaller.

        Returns:
            The numbers of each piece's images.
        """
        return [range(i, min(i + batch, self.num_images)) for i in range(0, self.num_images, batch)]

    def draw(self, numbers: Sequence[int], mask: tuple[bool, ...]) -> NDArray[np.uint8]:
        """Makes some of the images.

        Args:
            numbers: Which, 0 to num_images - 1.
            mask: The clock spelt out, True = full.

        Returns:
            uint8 [len(numbers), H, W, 3].

        Raises:
            NotFiniteError: The model's output is not finite.
        """
        sampler, graphs = self.sampler, self.sampler.session.graphs
        scheduler = make_scheduler(sampler.scheduler, len(mask))
        shape = (3, sampler.size, sampler.size)
        drawn = np.stack([noise(self.seed, shape, image=int(i)) for i in numbers])
        cond, uncond = {}, {}
        if self.classes is not None:
            dtype = next(tensor.dtype for graph in graphs for tensor in graph.inputs if tensor.name == "class_labels")
            cond["class_labels"] = self.classes[np.asarray(numbers)].astype(dtype)
            if self.guidance_scale > 1:
                uncond["class_labels"] = np.full(len(numbers), sampler.null_label, dtype=dtype)
        request = Request(
            graphs=graphs,
            scheduler=scheduler,
            clock=mask,
            guidance=(self.guidance_scale,) * len(mask),
            latents=drawn * np.float32(scheduler.init_noise_sigma),
            cond=cond,
            uncond=uncond,
            seed=self.seed,
        )
        *_, last = denoise(request, sampler.session)
        return to_uint8(last.latents)
