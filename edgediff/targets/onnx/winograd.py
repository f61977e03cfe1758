"""Convolutions of 3 x 3 by Winograd's minimal filtering along columns: F(4, 3), half the multiplications.

Four rows of a result take twelve products of a row of pixels and a row of the kernel. Winograd's algorithm (Lavin and
Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016) takes six, of sums of pixel rows with sums of
kernel rows; the four rows are sums of their results. ONNX Runtime's CPU kernels do not have it. In the graph, sums of
rows are a matmul with a constant, and the six products are convolutions of 1 x 3 on maps of a quarter of the rows.

Along one direction only: along both it would take a quarter of the multiplications, but was no faster (the maps must be
transposed between the steps), takes four times the weights' memory instead of twice, and rounds more.
"""

import logging
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper

from edgediff.targets.onnx.kernels import Convolution, convolution, kernels
from edgediff.targets.onnx.rewriting import Rewriting

log = logging.getLogger(__name__)

# F(4, 3) at the points 0, 1, -1, 2, -2 and infinity.
_PIXELS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_RESULT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
TILE, PRODUCTS = _RESULT.shape
# The product whose result each of the four rows takes once: a bias goes there.
_BIASED = 1
# With fewer channels the sums cost what the products save. With fewer rows there are many weights for each pixel: new
# kernels take memory and time to load (maps of 16 rows of Stable Diffusion v1.5, 1.6 GiB and 15 s), and win little.
CHANNELS, ROWS = 128, 32


def filter_rows(model: ModelProto) -> ModelProto:
    """Writes every convolution of 3 x 3 that is large enough as six of 1 x 3 between sums of rows.

    Those whose input's size is not known, or whose rows are too many or not a multiple of four, stay.
    """
    rewriting = Rewriting(model)
    nodes: list[NodeProto] = []
    count = 0
    for node in model.graph.node:
        found = convolution(node, rewriting)
        rows = 0 if found is None else next(iter(rewriting.shape(node.input[0])[2:]), 0)
        if found is None or not _pays(found, rows):
            nodes.append(node)
        else:
            count += 1
            nodes += _filtered(found, rows, rewriting)
    if not count:
        return model
    log.info("winograd: %d convolutions", count)
    return rewriting.finish(nodes)


def _pays(of: Convolution, rows: int) -> bool:
    """Whether it is the faster way on maps of so many rows; 0 where they are not known.

    A matrix that sums rows has an entry for each two of them, so that a row of each input and each output takes
    `1.5 * rows` multiplications, for `4.5 * inputs * outputs` that are saved. Where that is more than a third of the
    saving, time is lost on memory (the table in benchmarks/log/pipelines.md).
    """
    fits = min(of.inputs, of.outputs) >= CHANNELS and rows >= ROWS and rows % TILE == 0
    return fits and rows * (of.inputs + of.outputs) <= of.inputs * of.outputs


def _filtered(of: Convolution, rows: int, rewriting: Rewriting) -> list[NodeProto]:
    """The nodes that take a convolution's place."""
    x, out = of.node.input[0], of.node.output[0]
    spread, gather = sums_of_rows(rows)
    # A kernel of 1 x 3 is a sum of the three rows.
    sums = np.einsum("ka,xy->kxay", _KERNEL, np.eye(3)).reshape(PRODUCTS, 3, 9)
    flat, nodes = kernels(of, "winograd", sums, (1, 3), rewriting)
    pixels = [f"{out}.pixels.{k}" for k in range(PRODUCTS)]
    products = [f"{out}.products.{k}" for k in range(PRODUCTS)]

    def add(kind: str, inputs: list[str], outputs: list[str], **said: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], **said))

    add("MatMul", [rewriting.constant(f"winograd.spread.{rows}", spread), x], [f"{out}.pixels"])
    parts = rewriting.constant(f"winograd.tiles.{rows}", np.full(PRODUCTS, rows // TILE))
    add("Split", [f"{out}.pixels", parts], pixels, axis=2)
    for k in range(PRODUCTS):
        bias = of.bias if k == _BIASED else []
        add("Conv", [pixels[k], flat[k], *bias], [products[k]], pads=[0, 1, 0, 1], kernel_shape=[1, 3])
    add("Concat", products, [f"{out}.products"], axis=2)
    add("MatMul", [rewriting.constant(f"winograd.gather.{rows}", gather), f"{out}.products"], [out])
    return nodes


def sums_of_rows(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums before and after the six convolutions, as float32 matrices on the rows, a multiple of 4, of a whole map.

    [6 * rows / 4, rows] for the pixels, with zeros around the map, and [rows, 6 * rows / 4] for the results. The six
    kinds of sums lie one after the other, so that each is a map of its own.
    """
    tiles = rows // TILE
    spread, gather = np.zeros((PRODUCTS, tiles, rows)), np.zeros((tiles, TILE, PRODUCTS, tiles))
    for tile in range(tiles):
        first = TILE * tile - 1  # a row above
        inside = [row for row in range(PRODUCTS) if 0 <= first + row < rows]
        spread[:, tile, [first + row for row in inside]] = _PIXELS[:, inside]
        gather[tile, :, :, tile] = _RESULT
    return (
        spread.reshape(-1, rows).astype(np.float32),
        gather.reshape(rows, -1).astype(np.float32),
    )
