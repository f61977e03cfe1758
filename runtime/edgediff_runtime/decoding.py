"""The ``decode`` stage: finished latents become pictures, one after the other."""

import numpy as np

from edgediff_runtime.manifest import Graph, Vae
from edgediff_runtime.sessions import Array, Session
from edgediff_runtime.text_encoding import run_one


def decode(session: Session, graph: Graph, vae: Vae, latents: Array) -> Array:
    """Decodes the loop's latents, float32 [N, C, H, W], one at a time with the decoder's graph for their size.

    Returns:
        float32 [N, 3, H * downscale, W * downscale], about -1 to 1.
    """
    wanted, given = graph.outputs[0].name, graph.inputs[0].name
    z = to_vae(vae, latents)
    return np.concatenate([run_one(session, graph, {given: z[i : i + 1]})[wanted] for i in range(len(z))])


def to_vae(vae: Vae, latents: Array) -> Array:
    """The loop's latents as the decoder takes them, float32 [N, C, H, W]."""
    if vae.mean is not None and vae.std is not None:
        mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (vae.mean, vae.std))
        return latents * std / np.float32(vae.scaling_factor) + mean
    return latents / np.float32(vae.scaling_factor)
