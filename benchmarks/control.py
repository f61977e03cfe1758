"""A ControlNet under the clock: are its residuals reused on cached steps, or are the high-resolution ones run again?

A small ControlNet learns to draw by edges from pictures that drawings-64 draws itself: no images are needed. Then
drawings that it has not seen are drawn by their edges at clock 1, and at clock 2 with the residuals of the last full
step (what a bundle does), with those of the high-resolution levels run again, and without any. `--folder` keeps the
pictures and the training, which goes on where it was stopped: an hour on one core.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from measure import exported, machine
from torch.nn import functional as F

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.models.controlnet import ControlNet, control_names
from edgediff.models.graphs import divide, graph_list
from edgediff.models.part import Part
from edgediff.models.torch_session import TorchSession
from edgediff.models.trained import choose_adaptor
from edgediff.train.rollout import Prompts
from edgediff.train.text import STATES, text_of
from edgediff.zoo import FOLDER
from edgediff_runtime import EdgePipeline
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.manifest import Graph
from edgediff_runtime.sessions import Array

MODEL = "drawings-64"
STYLES = ("fluent 3d", "fluent flat", "noto", "twemoji")
PICTURES, AT_ONCE, BATCH, RATE = 2048, 32, 16, 5e-4
UNCONDITIONAL = 0.1  # share of the pictures that are learnt without their prompt
SEEN_FROM, SEED, COUNT = 2**50, 1, 32
EVERY = 100


def main() -> None:
    """Trains what is not trained yet, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where pictures and the ControlNet are kept; left out, nowhere")
    parser.add_argument("--updates", type=int, default=4000)
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if given.folder is None else given.folder
        folder.mkdir(parents=True, exist_ok=True)
        pictures = load_pictures(folder / "pictures.npz", Path(scratch))
        train(pictures, folder / "controlnet", given.updates)
        measure(folder / "controlnet", Path(scratch))


def captions() -> list[str]:
    """Every thing that the model was taught, in every style."""
    things = (FOLDER / MODEL / "things.txt").read_text(encoding="utf-8").split("\n")
    return [f"{thing}, {style}" for thing in things if thing.strip() for style in STYLES]


def edges_of(images: Array) -> Array:
    """Edges by Sobel, uint8 [N, h, w, 3], of pictures uint8 [N, h, w, 3]; white where a picture changes."""
    grey = torch.from_numpy(images.astype(np.float32).mean(axis=3, keepdims=True)).permute(0, 3, 1, 2)
    down = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]])
    filters = torch.stack([down, down.T])[:, None]
    across = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), filters)
    strength = (across.norm(dim=1) / 2).clamp(0, 255).round().to(torch.uint8).numpy()
    return np.repeat(strength[..., None], 3, axis=3)


def load_pictures(file: Path, scratch: Path) -> dict[str, Array]:
    """Latents, edges and the number of the caption of pictures that the model draws."""
    if not file.exists():
        pipe = EdgePipeline.from_pretrained(exported(MODEL, scratch / "plain", adaptor=None))
        said = captions()
        chosen = np.random.default_rng(SEED).integers(len(said), size=PICTURES)
        latents, edges = [], []
        for first in range(0, PICTURES, AT_ONCE):
            prompts = [said[i] for i in chosen[first : first + AT_ONCE]]
            made = pipe(prompt=prompts, clock=1, seed=SEEN_FROM, first_image=first)
            latents.append(made.latents)
            edges.append(edges_of(made.images))
        np.savez(file, latents=np.concatenate(latents), edges=np.concatenate(edges), captions=chosen)
    with np.load(file) as archive:
        return {name: archive[name] for name in archive.files}


def train(pictures: dict[str, Array], folder: Path, updates: int) -> None:
    """Trains a ControlNet beside the frozen UNet, or goes on; in `folder` as diffusers saves it."""
    model = edgediff.load_model(MODEL)
    unet = model.unet.requires_grad_(False)
    torch.manual_seed(SEED)
    net: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    state, done = folder.with_suffix(".pt"), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    prompts = Prompts.encoded(text_of(model, learns=False), captions(), guided=True)
    states, empty = (torch.from_numpy(rows[STATES]) for rows in (prompts.cond, prompts.uncond))
    assert model.scheduler is not None
    scheduler: Any = model.scheduler
    alphas = scheduler.alphas_cumprod
    latents, edges = (torch.from_numpy(pictures[name]) for name in ("latents", "edges"))
    losses: list[float] = []
    for update in range(done, updates):
        draw = torch.Generator().manual_seed(update)
        rows = torch.randint(len(latents), (BATCH,), generator=draw)
        time = torch.randint(len(alphas), (BATCH,), generator=draw)
        noise = torch.randn(latents[rows].shape, generator=draw)
        root, rest = (each.sqrt()[:, None, None, None] for each in (alphas[time], 1 - alphas[time]))
        noisy, target = root * latents[rows] + rest * noise, root * noise - rest * latents[rows]  # v
        text = states[torch.from_numpy(pictures["captions"])[rows]]
        dropped = torch.rand(BATCH, generator=draw) < UNCONDITIONAL
        text = torch.where(dropped[:, None, None], empty, text)
        control = edges[rows].permute(0, 3, 1, 2).float() / 255
        down, mid = net(noisy, time, text, control, return_dict=False)
        out = unet(
            noisy, time, text, down_block_additional_residuals=down, mid_block_additional_residual=mid,
            return_dict=False,
        )[0]  # fmt: skip
        loss = F.mse_loss(out, target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss))
        if (update + 1) % EVERY == 0 or update + 1 == updates:
            print(f"update {update + 1} of {updates}: loss {np.mean(losses[-EVERY:]):.4f}", flush=True)
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": update + 1}, state)
    net.save_pretrained(folder)


class HighresControl(Part):
    """The residuals of the high-resolution levels alone, as a ControlNet makes them."""

    def __init__(self, whole: ControlNet, count: int) -> None:
        super().__init__(whole.inputs, tuple(control_names(count)))
        self.whole = whole
        self.count = count

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the way down to the last of them."""
        of = self.whole
        emb = of.embedding(tensors["sample"], tensors)
        x = of.conv_in(tensors["sample"]) + of.of_image(tensors["control_image"])
        skips = [x]
        for layer in of.layers:
            if len(skips) >= self.count:
                break
            x = layer(x, skips, emb, tensors.get(STATES))
        scale = tensors["control_scale"].reshape(-1, 1, 1, 1)
        return {name: conv(skip) * scale for name, conv, skip in zip(self.outputs, of.down_convs, skips, strict=False)}


def measure(folder: Path, scratch: Path) -> None:
    """Draws unseen drawings by their edges, in torch."""
    model = edgediff.load_model(MODEL, control=str(folder))
    config = edgediff.ExportConfig(control=(str(folder),), verify=VerifyConfig(mode="graphs"))
    edgediff.export_bundle(model, scratch / "steered", config)
    bundle = EdgePipeline.from_pretrained(scratch / "steered")
    said = captions()
    prompts = [said[i] for i in np.random.default_rng(SEED + 1).permutation(len(said))[:COUNT]]
    drawn = bundle(prompt=prompts, clock=1, seed=SEED)
    edges = edges_of(drawn.images)
    for adaptor in ("resnet-clock-2", "identity"):
        part = choose_adaptor(adaptor, model, edgediff.Cut(), bundle.manifest.operating_point).part
        divided = divide(model, edgediff.Cut(), part)
        graphs = graph_list(divided, model)
        assert isinstance(divided.controlnet, ControlNet)
        taken = [name for name in divided.highres_out.inputs if name.startswith("control_")]
        again = HighresControl(divided.controlnet, len(taken))
        net = graphs[0]
        anew = replace_graph(net, again)
        ways = {
            "reused": TorchSession(divided.parts, graphs),
            "high-resolution ones run again": TorchSession({**divided.parts, anew.name: again}, (anew, *graphs)),
        }
        first = None
        for name, session in ways.items():
            parts = Components({**bundle.components.graphs, UNET: session.graphs}, opener(bundle, session), keep=True)
            pipe = EdgePipeline(bundle.manifest, parts, bundle._tokenizers, warn=False)
            asked: dict[str, Any] = {"prompt": prompts, "control_image": edges, "seed": SEED + 2}
            if first is None:
                first = pipe(**asked, clock=1)
                told(f"{adaptor}, clock 1", first, first, edges)
                told("  without its edges, clock 1", pipe(prompt=prompts, seed=SEED + 2, clock=1), first, edges)
            told(f"  clock 2, residuals {name}", pipe(**asked, clock=2), first, edges)


def opener(bundle: EdgePipeline, session: TorchSession) -> Any:
    """Opens a component: the UNet in torch, the others as the bundle does."""
    return lambda name: session if name == UNET else bundle.components.session(name)


def replace_graph(net: Graph, part: Part) -> Graph:
    """The ControlNet's graph as one of cached steps that makes less."""
    outputs = tuple(tensor for tensor in net.outputs if tensor.name in part.outputs)
    return Graph("highres_controlnet", "highres_controlnet", "cached_step", net.inputs, outputs)


def told(what: str, made: Any, first: Any, edges: Array) -> None:
    """Prints how near pictures are to those of clock 1, and how well they keep to their edges."""
    kept = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(edges_of(made.images), edges, strict=True)]
    near = [psnr_db(a, b) for a, b in zip(first.pixels, made.pixels, strict=True)] if made is not first else [np.inf]
    print(f"{what}: {np.mean(near):.1f} dB of clock 1, correlation with the edges {np.mean(kept):.3f}")


if __name__ == "__main__":
    main()
