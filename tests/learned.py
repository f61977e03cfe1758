"""Adaptors that were never trained and are not the identity, in folders of their own."""

from pathlib import Path

import msgspec
import torch

import edgediff
from edgediff import Cut, split
from edgediff.models.adaptors import LearnedAdaptor, make_adaptor
from edgediff.models.graphs import adaptor_shape
from edgediff.models.trained import AdaptorRecord, save_adaptor
from edgediff_runtime.manifest import TrainedFor

CUT = Cut()
HERE = TrainedFor(num_inference_steps=4, scheduler="dpmpp_2m", clock=2, mask=(1, 0, 1, 0), guidance_scale=2.0)


def record_for(model: edgediff.Model, cut: Cut = CUT, **changes: object) -> AdaptorRecord:
    shape = adaptor_shape(split(model.unet, cut), model)
    record = AdaptorRecord(
        edgediff_adaptor=1, kind="resnet", takes_text=False, model=model.name, model_sha256=model.sha256, cut=cut,
        highres=shape.highres, lowres=shape.lowres, emb=shape.emb, text=None, trained_for=HERE, rollout="teacher",
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


def trained(model: edgediff.Model, path: Path, cut: Cut = CUT, seed: int = 0, **changes: object) -> Path:
    """A folder with an adaptor whose last layer is not zero."""
    record = record_for(model, cut, **changes)
    torch.manual_seed(seed)
    part = make_adaptor(record.kind, record.shape)
    assert isinstance(part, LearnedAdaptor)
    torch.nn.init.normal_(list(part.body.parameters())[-2], std=0.05)
    save_adaptor(part, record, path)
    return path
