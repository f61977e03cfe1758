"""A ControlNet under the clock: do its residuals stay for cached steps, or are they made anew in every step?

A small ControlNet learns to draw by edges, from pictures that drawings-64 drew itself. Then things in styles are drawn
by the edges of other pictures of theirs, at clock 1, and at clock 2 with residuals of the last full step (as a bundle
has it) or with those of the high-resolution levels made anew. How near are they to clock 1, how well do their edges
correlate with those asked for, and does a classifier see what was asked for? With `--folder` the pictures and the
training are kept and go on where they stopped.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import ControlNetModel
from editing import MODEL, STYLES, correlation, every_thing, save_sheet, seen
from measure import exported, machine
from torch.nn import functional as F

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.export.prepare import Prepared, prepare
from edgediff.models.graphs import graph_list
from edgediff.models.torch_pipeline import source_tokenizers
from edgediff.models.torch_session import TorchSession
from edgediff.train.rollout import Prompts
from edgediff.train.text import STATES, text_of
from edgediff_runtime import EdgePipeline, Result
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.manifest import CONTROLNET
from edgediff_runtime.sessions import Array

PICTURES, AT_ONCE, BATCH, RATE = 768, 32, 16, 5e-4
UNCONDITIONAL = 0.1  # of the pictures are learnt without their prompt
SEED, COUNT, SHOWN = 1, 32, 8
EVERY = 50


def main() -> None:
    """Trains what is not trained yet, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where pictures and the ControlNet are kept; left out, nowhere")
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--sheet", type=Path, help="a PNG: edges, no control, clock 1, residuals that stay, anew")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if given.folder is None else given.folder
        folder.mkdir(parents=True, exist_ok=True)
        train(drawn(folder / "pictures.npz", Path(scratch)), folder / "controlnet", given.updates)
        measure(str(folder / "controlnet"), given.sheet)


def captions() -> list[str]:
    """Every thing that the model was taught, in every style, in a seeded order."""
    said = [f"{thing}, {style}" for thing in every_thing() for style in STYLES]
    return [said[i] for i in np.random.default_rng(SEED).permutation(len(said))]


def edges_of(images: Array) -> Array:
    """Edges by Sobel, uint8 [N, h, w, 3], of pictures uint8 [N, h, w, 3]; white where a picture changes."""
    grey = torch.from_numpy(images.astype(np.float32).mean(axis=3)[:, None])
    down = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]])
    filters = torch.stack([down, down.T])[:, None]
    across = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), filters)
    strength = (across.norm(dim=1) / 2).clamp(0, 255).round().to(torch.uint8).numpy()
    return np.repeat(strength[..., None], 3, axis=3)


def drawn(file: Path, scratch: Path) -> dict[str, Array]:
    """Latents and edges of pictures that the model draws, of the last captions; the first ones are measured with."""
    if not file.exists():
        pipe = EdgePipeline.from_pretrained(exported(MODEL, scratch / "plain", adaptor=None))
        said = captions()[-PICTURES:]
        made = [
            pipe(prompt=said[first : first + AT_ONCE], clock=1, seed=SEED, first_image=first)
            for first in range(0, PICTURES, AT_ONCE)
        ]
        latents = np.concatenate([each.latents for each in made])
        np.savez(file, latents=latents, edges=np.concatenate([edges_of(each.images) for each in made]))
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
    prompts = Prompts.encoded(text_of(model, learns=False), captions()[-PICTURES:], guided=True)
    states, empty = (torch.from_numpy(rows[STATES]) for rows in (prompts.cond, prompts.uncond))
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
        dropped = torch.rand(BATCH, generator=draw) < UNCONDITIONAL
        text = torch.where(dropped[:, None, None], empty, states[rows])
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
        losses.append(loss.item())
        if (update + 1) % EVERY == 0 or update + 1 == updates:
            print(f"update {update + 1} of {updates}: loss {np.mean(losses[-EVERY:]):.4f}", flush=True)
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "done": update + 1}, state)
    net.save_pretrained(folder)


@torch.no_grad()
def measure(control: str, sheet: Path | None) -> None:
    """Draws captions that it did not learn from by the edges of pictures of theirs, in torch."""
    model = edgediff.load_model(MODEL, control=control)
    prompts = captions()[:COUNT]
    wanted = [prompt.rsplit(", ", 1)[0] for prompt in prompts]
    for kind, adaptor in (("learned adaptor", None), ("identity", "identity")):
        found = prepare(model, edgediff.ExportConfig(adaptor=adaptor, control=(control,)), lambda _: None)
        stay, anew = (opened(found, frequency) for frequency in ("full_step", "step"))
        edges = edges_of(stay(prompt=prompts, seed=SEED, clock=1).images)
        asked: dict[str, Any] = {"prompt": prompts, "seed": SEED + 1}
        steered = asked | {"control_image": edges}
        without, full = stay(**asked, clock=1), stay(**steered, clock=1)
        made = {"residuals stay": stay(**steered, clock=2), "residuals made anew": anew(**steered, clock=2)}
        print(f"{kind}, {COUNT} pictures, pixels against clock 1")
        tell("no control, clock 1", without, None, edges, wanted)
        tell("no control, clock 2", stay(**asked, clock=2), without, edges, wanted)
        tell("by edges, clock 1", full, None, edges, wanted)
        for name, result in made.items():
            tell(f"by edges, clock 2, {name}", result, full, edges, wanted)
        if sheet is not None and adaptor is None:
            rows = [edges, *(each.images for each in (without, full, *made.values()))]
            save_sheet([row[:SHOWN] for row in rows], sheet)


def opened(found: Prepared, frequency: str) -> EdgePipeline:
    """The pipeline in torch, whose ControlNet runs as often as that; cached graphs take what they need of it."""
    graphs = tuple(
        msgspec.structs.replace(graph, frequency=frequency) if graph.name == CONTROLNET else graph
        for graph in graph_list(found.divided, found.model)
    )
    others = {name: TorchSession({name: each.load()}, (each.graph,)) for name, each in found.components.items()}
    assert found.draft.prompt is not None
    words = source_tokenizers(found.components, found.draft.prompt)
    sessions = Components.of({UNET: TorchSession(found.divided.parts, graphs), **others})
    return EdgePipeline(found.draft, sessions, lambda: words, warn=False)


def tell(what: str, made: Result, near: Result | None, edges: Array, things: Sequence[str]) -> None:
    """Prints how near pictures are to others, how well they keep to the edges, and whether they are what was asked."""
    said = f"edges correlate by {correlation(edges_of(made.images), edges):.3f}, {seen(made.images, things)}"
    if near is not None:
        assert near.pixels is not None
        assert made.pixels is not None
        db = [psnr_db(a, b) for a, b in zip(near.pixels, made.pixels, strict=True)]
        said = f"{np.mean(db):.2f} dB (10 %: {np.percentile(db, 10):.1f}), {said}"
    print(f" {what}: {said}", flush=True)


if __name__ == "__main__":
    main()
