"""Latents become pictures, one after the other: as a whole, or in tiles that fade into each other."""

from collections.abc import Callable

import numpy as np

from edgediff_runtime.manifest import Graph, Vae
from edgediff_runtime.sessions import Array, Session
from edgediff_runtime.text_encoding import run_one

# Of a tile's side, what it has in common with the next one: one part of so many (diffusers' tile_overlap_factor).
OVERLAP = 4
# A decoder's graph for a latent of a height and a width; None where it has none.
GraphAt = Callable[[int, int], Graph | None]


def decode(session: Session, graph_at: GraphAt, vae: Vae, latents: Array, tile: int | None = None) -> Array:
    """Decodes the loop's latents, float32 [N, C, H, W], one at a time.

    Tiles overlap by a quarter and are blended as diffusers' `AutoencoderKL.tiled_decode` does; memory then follows
    from the tile. At the right and lower ends diffusers decodes what is left, a narrower tile. So does this where the
    decoder has a graph for it (graphs of any size); else the tile is moved inwards until it is whole, and only the
    same pixels of it are taken, which have seen more of the picture than diffusers' have.

    Args:
        tile: Side of a tile in the latent, a multiple of 4 for which there is a graph; None, or one that is not
            smaller than the latent, decodes the latent as a whole.

    Returns:
        float32 [N, 3, H * downscale, W * downscale], about -1 to 1.
    """
    z = to_vae(vae, latents)
    height, width = z.shape[2:]
    side = max(height, width) if tile is None else tile
    return np.concatenate([_in_tiles(session, graph_at, z[i : i + 1], side, vae.downscale) for i in range(len(z))])


def _in_tiles(session: Session, graph_at: GraphAt, z: Array, tile: int, scale: int) -> Array:
    """One latent, [1, C, H, W], decoded in tiles; in a single one where that is large enough."""
    height, width = z.shape[2:]

    def pixels(top: int, left: int) -> Array:
        """Those of the tile that begins there."""
        bottom, right = min(top + tile, height), min(left + tile, width)
        y, x, graph = top, left, graph_at(bottom - top, right - left)
        if graph is None:
            y, x = max(bottom - tile, 0), max(right - tile, 0)
            graph = graph_at(bottom - y, right - x)
        assert graph is not None  # there is one for a whole tile
        wanted, given = graph.outputs[0].name, graph.inputs[0].name
        made = run_one(session, graph, {given: z[:, :, y:bottom, x:right]})[wanted]
        return made[..., scale * (top - y) :, scale * (left - x) :]

    if max(height, width) <= tile:
        return pixels(0, 0)
    overlap = tile // OVERLAP
    stride = tile - overlap
    bands, above = list[Array](), list[Array]()
    for top in range(0, height, stride):
        row = list[Array]()
        for left in range(0, width, stride):
            made = pixels(top, left)
            if above:
                _blend(above[len(row)], made, -2, scale * overlap)
            if row:
                _blend(row[-1], made, -1, scale * overlap)
            row.append(made)
        bands.append(np.concatenate([made[..., : scale * stride, : scale * stride] for made in row], axis=-1))
        above = row
    return np.concatenate(bands, axis=-2)


def _blend(before: Array, tile: Array, axis: int, overlap: int) -> None:
    """Fades from the end of the tile before into the beginning of this one, which is changed."""
    old, new = np.moveaxis(before, axis, -1), np.moveaxis(tile, axis, -1)
    count = min(old.shape[-1], new.shape[-1], overlap)
    share = np.arange(count, dtype=np.float32) / np.float32(count)
    new[..., :count] = old[..., -count:] * (1 - share) + new[..., :count] * share


def to_vae(vae: Vae, latents: Array) -> Array:
    """The loop's latents as the decoder takes them, float32 [N, C, H, W]."""
    if vae.mean is not None and vae.std is not None:
        mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (vae.mean, vae.std))
        return latents * std / np.float32(vae.scaling_factor) + mean
    return latents / np.float32(vae.scaling_factor)
