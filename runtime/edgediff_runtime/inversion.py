"""DDIM inversion (Song et al. 2020, section 4.3): from a picture to the noise that DDIM draws it from.

DDIM's steps are linear in the latent and the UNet's output, so each can be taken backwards, but for one thing: the
output belongs to the noisier latent that is looked for. The first guess takes the UNet's output for the cleaner one;
each refinement takes it again for the last guess (a fixed-point iteration).
"""

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.image import replacing
from edgediff_runtime.loop import Step
from edgediff_runtime.samplers import Array, Scheduler, State, mix
from edgediff_runtime.schedulers import SchedulerConfig, make_scheduler, with_sampler

DDIM = "ddim"
MAX_REFINEMENTS = 20
# Before the names of conditioning tensors in a file.
COND = "cond."


@dataclass(frozen=True, eq=False)
class Inverted:
    """What an inversion found.

    Attributes:
        latents: float32 [N, C, H, W], which ``pipe(latents=..., scheduler="ddim")`` begins with.
        ledger: Each call of the UNet, without its tensors and latents.
        stages: Milliseconds of each component outside of the loop, by its name.
        trajectory: What the UNet sees of the pictures in each step of drawing them, float32 [steps, N, C, H, W], the
            noisiest first; what plug-and-play injection draws along.
        timesteps: DDIM's, [steps], in the same order.
        cond: What the pictures were inverted with, rows [N, ...] of each conditioning tensor.
        flops_saved: Share of the UNet's operations that cached calls saved.
    """

    latents: Array
    ledger: tuple[Step, ...]
    stages: dict[str, float]
    trajectory: Array
    timesteps: Array
    cond: dict[str, Array]
    flops_saved: float = 0.0

    @property
    def mask(self) -> tuple[int, ...]:
        """The calls as they were run, 1 = full."""
        return tuple(int(step.full) for step in self.ledger)


def write_inverted(inverted: Inverted, path: Path) -> None:
    """Writes what an inversion found as ``.npz``: ``trajectory``, ``timesteps`` and the condition, as ``cond.NAME``."""
    arrays: dict[str, Any] = {"trajectory": inverted.trajectory, "timesteps": inverted.timesteps}
    arrays |= {f"{COND}{name}": rows for name, rows in inverted.cond.items()}
    data = io.BytesIO()  # numpy does not report a full disk
    np.savez(data, **arrays)
    with replacing(path) as scratch:
        scratch.write_bytes(data.getvalue())


def read_inverted(path: Path) -> Inverted:
    """Reads what `write_inverted` wrote, without its ledger; a RequestError where it is no such file."""
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):  # numpy would take it for a pickle
                raise ValueError("it is no archive of arrays")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as e:  # a damaged file may end in errors of zip archives or of Python's tokenizer
        raise RequestError(f"--inverted {path} cannot be read as .npz: {one_line(e, 200)}") from e
    trajectory, timesteps = (arrays.pop(name, np.empty(0)) for name in ("trajectory", "timesteps"))
    fits = trajectory.ndim == 5 and timesteps.shape == trajectory.shape[:1]
    for name, rows in arrays.items():
        fits = fits and name.startswith(COND) and rows.shape[:1] == trajectory.shape[1:2]
    for each in (trajectory, timesteps, *arrays.values()):
        fits = fits and each.dtype.kind in "iuf" and each.size > 0 and bool(np.isfinite(each).all())
    if not fits:
        raise RequestError(f"--inverted {path} holds no inverted picture; give what edgediff invert -o FILE.npz writes")
    trajectory = trajectory.astype(np.float32)
    cond = {name.removeprefix(COND): rows for name, rows in arrays.items()}
    return Inverted(trajectory[0], (), {}, trajectory, timesteps, cond)


@dataclass(frozen=True, eq=False)
class InverseDdim(Scheduler):
    """DDIM's steps backwards, the last first; a row is (x_0 from x, from the output, x from x_prev, from the output).

    The state is the latent that a step began with, which refinements come back to. Nothing begins at a noise level
    on the way, so that no levels are kept.
    """

    name = "ddim_inverse"
    settings: ClassVar = {}
    diffusers_class = "DDIMInverseScheduler"
    refinements: int = 0

    @classmethod
    def make(cls, config: SchedulerConfig, num_inference_steps: int) -> Self:
        """See ``Scheduler.make``; `config` is DDIM's."""
        ddim = make_scheduler(config, num_inference_steps)
        rows = [
            (x0_x, x0_out, np.float32(1 / float(of_x)), np.float32(-float(of_out) / float(of_x)))
            for x0_x, x0_out, _, of_x, of_out, _ in ddim._rows[::-1]
        ]
        return cls(
            timesteps=ddim.timesteps[::-1].copy(),
            init_noise_sigma=1.0,
            needs_noise=False,
            _rows=tuple(rows),
            _levels=(),
        )

    def refined(self, times: int) -> "InverseDdim":
        """The same with each step taken so many times more, as calls of their own."""
        calls = times + 1
        rows = tuple(row for row in self._rows for _ in range(calls))
        return replace(self, timesteps=np.repeat(self.timesteps, calls), _rows=rows, refinements=times)

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_out = self._rows[i][2:]
        begun = x_t if i % (self.refinements + 1) == 0 else before[0]
        return mix((of_x, begun), (of_out, out)), (begun,)


def inverse_scheduler(config: SchedulerConfig, num_inference_steps: int, refinements: int = 0) -> InverseDdim:
    """DDIM's steps of a bundle's noise process backwards.

    Raises:
        RequestError: The number of refinements or steps is out of range, or DDIM would clip or draw noise.
    """
    if isinstance(refinements, bool) or not isinstance(refinements, int) or not 0 <= refinements <= MAX_REFINEMENTS:
        raise RequestError(f"refinements is {refinements!r}; expected 0 to {MAX_REFINEMENTS}")
    ddim = with_sampler(config, DDIM)
    if ddim.clip_sample or ddim.eta:
        raise RequestError(
            f"the bundle's ddim has clip_sample {ddim.clip_sample} and eta {ddim.eta:g}: such steps cannot be taken "
            "backwards; expected False and 0"
        )
    return InverseDdim.make(ddim, num_inference_steps).refined(refinements)
