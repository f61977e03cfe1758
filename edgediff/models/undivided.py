"""The undivided UNet behind the runtime's interfaces: full steps are checked against it, training samples with it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import MultiControlNetModel, UNet2DConditionModel

from edgediff.models.controlnet import MID, control_names
from edgediff.models.injection import ROW_TENSORS
from edgediff.models.lora_inputs import Factors, with_lora_layers
from edgediff.models.part import Part
from edgediff.models.t2i_adapter import feature_names
from edgediff.models.torch_session import TorchSession, graph_tensor
from edgediff_runtime.manifest import CONTROL_IMAGE, CONTROL_SCALE, T2I_ADAPTER, Graph, has_rows, numbered

if TYPE_CHECKING:
    from edgediff.models.controlnet import Control
    from edgediff.models.load import Model

NAME = "undivided"
ADDED = ("text_embeds", "time_ids")


def predict(unet: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Runs one of diffusers' UNets: sample [B, C, H, W], timestep [1] or [B], conditioning by name -> [B, C', H, W].

    Residuals of a ControlNet and features of a T2I-Adapter are conditioning too, by the names of their modules.
    """
    given: dict[str, Any] = {name: value for name, value in cond.items() if name not in ADDED}
    added = {name: cond[name] for name in ADDED if name in cond}
    if added:
        given["added_cond_kwargs"] = added
    if isinstance(unet, UNet2DConditionModel):
        given.setdefault("encoder_hidden_states", None)  # a required argument, also where no layer uses it
    if MID in given:
        given["mid_block_additional_residual"] = given.pop(MID)
        names = control_names(sum(name.startswith("control_") for name in given))
        given["down_block_additional_residuals"] = tuple(given.pop(name) for name in names)
    features = feature_names(sum(name.startswith(T2I_ADAPTER) for name in given))
    if features:
        given["down_intrablock_additional_residuals"] = [given.pop(name) for name in features]
    out: torch.Tensor = unet(sample, timestep, **given, return_dict=False)[0]
    return out


class Undivided(Part):
    """A diffusers UNet as a part, steered by ControlNets where there are some; weights are shared.

    Nothing is injected: every row is what it is where each takes its own.
    """

    def __init__(self, unet: Any, inputs: tuple[str, ...], control: Sequence["Control"] = ()) -> None:
        super().__init__(inputs, ("out_sample",))
        self.unet = unet
        self.control: Any = MultiControlNetModel([each.net for each in control]) if control else None
        self.steering = [[numbered(name, i) for i in range(len(control))] for name in (CONTROL_IMAGE, CONTROL_SCALE)]

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the UNet."""
        left_out = ("sample", *ROW_TENSORS)
        cond = {name: value for name, value in tensors.items() if has_rows(name) and name not in left_out}
        if self.control is not None:
            images, scales = ([cond.pop(name) for name in names] for names in self.steering)
            cond |= self._residuals(tensors, images, scales)
        return {"out_sample": predict(self.unet, tensors["sample"], tensors["timestep"], cond)}

    def _residuals(
        self, tensors: dict[str, torch.Tensor], images: list[torch.Tensor], scales: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What diffusers' ControlNets make of them; a scale of theirs is one number."""
        added = {name: tensors[name] for name in ADDED if name in tensors}
        down, mid = self.control(
            tensors["sample"], tensors["timestep"], tensors.get("encoder_hidden_states"), images,
            [scale[0].item() for scale in scales], added_cond_kwargs=added or None, return_dict=False,
        )  # fmt: skip
        return dict(zip(control_names(len(down)), down, strict=True)) | {MID: mid}


def undivided_graph(model: "Model", file: str = NAME, factors: tuple[Factors, ...] = ()) -> Graph:
    """The undivided UNet as the manifest would list it: a graph that every step runs."""
    channels, height, width = model.sample_shape
    given = {"sample": torch.empty(1, channels, height, width, device="meta"), "timestep": torch.empty(1)}
    given |= {name: spec.empty() for name, spec in model.step_tensors.items()}
    given |= {name: torch.empty(shape, device="meta") for each in factors for name, shape in each.shapes.items()}
    out = torch.empty(1, model.out_channels, height, width, device="meta")
    return Graph(
        name=NAME,
        file=file,
        frequency="step",
        inputs=tuple(graph_tensor(name, value) for name, value in given.items()),
        outputs=(graph_tensor("out_sample", out),),
    )


def undivided_session(model: "Model", batch: int | None = None, factors: tuple[Factors, ...] = ()) -> TorchSession:
    """The undivided UNet behind the runtime's `Session`, on its weights' device: every step is full.

    `batch` is the number of rows that go through the UNet together; None for all of them. `factors` are the low-rank
    factors that it takes, as a divided one has them.
    """
    graph = undivided_graph(model, factors=factors)
    return TorchSession({NAME: undivided_part(model, tuple(t.name for t in graph.inputs), factors)}, (graph,), batch)


def undivided_part(model: "Model", inputs: tuple[str, ...], factors: tuple[Factors, ...] = ()) -> Undivided:
    """A model's UNet as a part, after its ControlNets; with low-rank factors among its inputs where it takes some."""
    part = Undivided(
        with_lora_layers(model.unet) if factors else model.unet,
        inputs,
        model.control,
    )
    part.factors = factors
    return part
