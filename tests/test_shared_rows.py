"""What guidance asks for twice and is computed once: where the pass fires, that the numbers hold, and who is told."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from unets import CASES, Case, unet2d_condition

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.shared_rows import has_shared_rows, share_rows
from edgediff.targets.onnx.write_onnx import write_graph
from edgediff_runtime.manifest import Graph, Tensor

SIZE, CHANNELS, TOKENS, WIDTH = 4, 3, 2, 5
# Tensors that are made of the sample and the time alone, whose sizes the graph tells.
INSIDE = ("times", "column", "emb", "emb_map", "skip", "with_time", "x", "x_rows")


def node(kind: str, inputs: str, output: str, **said: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], output, **said)


def tensor(name: str, *sizes: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def denoising(
    change: Callable[[list[NodeProto]], None] | None = None, *, outputs: tuple[str, ...] = ("out_sample",),
    without: tuple[str, ...] = (),
) -> ModelProto:  # fmt: skip
    """A step in small: two convolutions with the time added in between, then attention's products with a text.

    `change` rewrites the nodes, `outputs` are given, and of the tensors `without` no sizes are known.
    """
    rng = np.random.default_rng(0)
    weights = {
        "w": (CHANNELS, CHANNELS, 3, 3), "v": (CHANNELS, CHANNELS, 3, 3), "joined": (CHANNELS, 2 * CHANNELS, 1, 1),
        "of_time": (1, CHANNELS), "of_text": (WIDTH, CHANNELS),
    }  # fmt: skip
    integers = {"pixels": [0, CHANNELS, -1], "map": [0, CHANNELS, SIZE, SIZE], "ends": [2, 3], "last": [1]}
    nodes = [
        node("Shape", "sample", "rows", start=0, end=1),
        node("Expand", "timestep rows", "times"),
        node("Unsqueeze", "times last", "column"),
        node("MatMul", "column of_time", "emb"),
        node("Unsqueeze", "emb ends", "emb_map"),
        node("Conv", "sample w", "skip", pads=[1, 1, 1, 1]),
        node("Add", "skip emb_map", "with_time"),
        node("Conv", "with_time v", "x", pads=[1, 1, 1, 1]),
        node("Reshape", "x pixels", "x_rows"),
        node("MatMul", "encoder_hidden_states of_text", "keys"),
        node("MatMul", "keys x_rows", "scores"),
        node("Softmax", "scores", "weights", axis=1),
        node("Transpose", "keys", "values", perm=[0, 2, 1]),
        node("MatMul", "values weights", "seen"),
        node("Reshape", "seen map", "seen_map"),
        node("Concat", "seen_map skip", "both", axis=1),
        node("Conv", "both joined", "y"),
        node("Add", "y emb_map", "out_sample"),
    ]
    if change is not None:
        change(nodes)
    image = (CHANNELS, SIZE, SIZE)
    sizes = {
        "times": (), "column": (1,), "emb": (CHANNELS,), "emb_map": (CHANNELS, 1, 1), "skip": image, "with_time": image,
        "x": image, "x_rows": (CHANNELS, SIZE * SIZE), "out_sample": image,
        "skip_joined": (2 * CHANNELS,), "seen_map_joined": (2 * CHANNELS,),
    }  # fmt: skip
    made = {name: tensor(name, "batch", *size) for name, size in sizes.items()}
    text = tensor("encoder_hidden_states", "batch", TOKENS, WIDTH)
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("sample", "batch", *image), tensor("timestep", 1), text],
        [made[name] for name in outputs],
        [
            *(
                numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name)
                for name, size in weights.items()
            ),
            *(numpy_helper.from_array(np.array(values), name) for name, values in integers.items()),
        ],
        value_info=[made[name] for name in INSIDE if name not in (*outputs, *without)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: ModelProto, sample: np.ndarray, text: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"sample": sample, "timestep": np.array([7.0], np.float32), "encoder_hidden_states": text}
    return [np.asarray(made) for made in session.run(None, given)]


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(each.op_type for each in model.graph.node)


def drawn(images: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(images)
    sample = rng.standard_normal((images, CHANNELS, SIZE, SIZE)).astype(np.float32)
    return sample, rng.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(("images", "copies"), [(1, 1), (1, 2), (3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("outputs", [("out_sample",), ("out_sample", "skip", "emb")])
def test_images_are_convolved_once_and_repeated(images: int, copies: int, outputs: tuple[str, ...]) -> None:
    before, after = denoising(outputs=outputs), share_rows(denoising(outputs=outputs))
    sample, text = drawn(images, copies * images)
    rows = np.concatenate([sample] * copies)
    wanted = run(before, rows, text)
    for given in (sample, rows):
        for one, other in zip(run(after, given, text), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def test_where_rows_part() -> None:
    model = share_rows(denoising())
    tiles = [each for each in model.graph.node if each.op_type == "Tile"]
    # What the text meets, and what lay beside it; the time has one row, which sums repeat themselves.
    assert [each.input[0] for each in tiles] == ["x_rows", "skip"]
    assert "Expand" not in kinds(model)
    assert has_shared_rows(model)
    assert not has_shared_rows(denoising())
    # Sizes that are no longer true are not told.
    assert {value.name for value in model.graph.value_info} == set()


def test_results_of_the_graph_keep_their_names_and_have_all_rows() -> None:
    model = share_rows(denoising(outputs=("out_sample", "skip", "emb")))
    tiles = {each.output[0]: each.input[0] for each in model.graph.node if each.op_type == "Tile"}
    assert tiles == {"x_rows.copies": "x_rows", "skip.copies": "skip.few", "skip": "skip.few", "emb": "emb.few"}
    assert [value.name for value in model.graph.output] == ["out_sample", "skip", "emb"]


def test_a_time_that_is_joined_to_images_or_rows_is_repeated_for_them() -> None:
    def join(nodes: list[NodeProto]) -> None:
        for of in ("skip", "seen_map"):
            nodes.append(node("ReduceMean", f"{of} ends", f"{of}_mean", keepdims=0))
            nodes.append(node("Concat", f"{of}_mean emb", f"{of}_joined", axis=1))

    outputs = ("out_sample", "skip_joined", "seen_map_joined")
    sample, text = drawn(2, 4)
    wanted = run(denoising(join, outputs=outputs), np.concatenate([sample, sample]), text)
    model = share_rows(denoising(join, outputs=outputs))
    for one, other in zip(run(model, sample, text), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    repeated = {each.output[0] for each in model.graph.node if each.op_type == "Tile"}
    assert repeated == {"x_rows.copies", "skip.copies", "emb.images", "emb.rows", "skip_joined"}


def counted(nodes: list[NodeProto]) -> None:
    """Sizes are taken from a tensor of images."""
    nodes.insert(6, node("Shape", "skip", "like"))
    nodes[15].input[1] = "like"


def parted(nodes: list[NodeProto]) -> None:
    """The text is looked at between the convolutions."""
    keys = nodes.pop(9)
    nodes[7].input[0] = "with_text"
    nodes[7:7] = [
        keys,
        node("ReduceMean", "keys last", "text", keepdims=0),
        node("Unsqueeze", "text ends", "text_map"),
        node("Add", "with_time text_map", "with_text"),
    ]


@pytest.mark.parametrize(("change", "without"), [(counted, ()), (parted, ()), (None, ("skip",))])
def test_it_leaves_alone_what_it_cannot_share(change: Any, without: tuple[str, ...]) -> None:
    model = denoising(change, without=without)
    before = model.SerializeToString(deterministic=True)
    assert run(model, *drawn(2, 2))
    assert share_rows(model).SerializeToString(deterministic=True) == before


def test_where_nothing_else_has_rows_there_is_nothing_to_share() -> None:
    model = denoising()
    text = numpy_helper.from_array(drawn(1, 1)[1], model.graph.input.pop().name)
    model.graph.initializer.append(text)
    before = model.SerializeToString(deterministic=True)
    assert share_rows(model).SerializeToString(deterministic=True) == before


FAMILIES = {name: CASES[name] for name in ("2d-class", "sdxl-like", "text-and-class", "unclip-like")} | {
    "time-joined-to-class": Case(
        lambda: unet2d_condition(num_class_embeds=7, class_embeddings_concat=True), CASES["text-and-class"].cond
    )
}


@pytest.mark.parametrize("name", ["2d-class", *(pytest.param(n, marks=pytest.mark.long) for n in [*FAMILIES][1:])])
def test_each_family_shares_what_it_can(name: str, tmp_path: Path) -> None:
    case = FAMILIES[name]
    part = edgediff.split(case.build()).highres_in
    given = {"sample": torch.randn(2, part.conv_in.in_channels, 16, 16), "timestep": torch.tensor([7.0])}
    given |= case.cond(4)
    given |= given.pop("added_cond_kwargs", {})
    rows = given | {"sample": torch.cat([given["sample"], given["sample"]])}
    entry = Graph("highres_in", "highres_in.onnx", "step", *(
        tuple(
            Tensor(name, "int64" if name == "class_labels" else "float32", (1,) if name == "timestep" else ("batch",))
            for name in names
        )
        for names in (part.inputs, part.outputs)
    ))  # fmt: skip
    as_arrays = {name: rows[name].numpy() for name in part.inputs}
    done = write_graph(part, entry, as_arrays, tmp_path / "highres_in.onnx", OnnxConfig(), share=True)
    assert done.shares_rows
    session = ort.InferenceSession(tmp_path / "highres_in.onnx", providers=["CPUExecutionProvider"])
    few = session.run(None, as_arrays | {"sample": given["sample"].numpy()})
    with torch.no_grad():
        wanted = part(*(rows[name] for name in part.inputs))
    for made, torchs in zip(few, wanted, strict=True):
        assert psnr_db(torchs.numpy(), made) > 100
