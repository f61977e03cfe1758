"""What is the clock worth in editing, on a small Stable Diffusion that draws?

Pictures that the model drew itself, of things in a style, are edited into other things in the same style, at several
strengths, at clock 1 and 2 with the learned adaptor and with the identity: how near are the pictures of clock 2 to
those of clock 1, are they what was asked for (a classifier of drawings says), and what was saved, counted. For each
strength also how near other periods of the clock come to clock 1, in 20 steps. Then drawings are
inverted with DDIM and drawn again, as they are and, with plug-and-play injection, as something else. Without options in
some minutes; with `--images DRAWINGS` (`metadata.jsonl`) real drawings are inverted too. `--what control`: how near are
pictures by ControlNets and T2I-Adapters to diffusers' own, on the small pipelines of the tests?

`--what control-cost` asks what a ControlNet costs at Stable Diffusion v1.5's size instead, with random weights: the
steps of a bundle without one and of a bundle with one, in turns. `--what lora-cost` asks the same of low-rank factors
as inputs, of the ranks 8 and 32. Both want 16 GB of memory.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel
from measure import exported, in_turns, machine, ratios, spread, verdict
from PIL import Image

import edgediff
from edgediff.bench.turns import Call, Said, parts_of
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import drawn_lora
from edgediff.config.floors import VerifyConfig
from edgediff.models.classifier import as_input, load_classifier, ranks_of
from edgediff.zoo import FOLDER, built_in
from edgediff_runtime import EdgePipeline, Result, noise
from edgediff_runtime.clock import letters
from edgediff_runtime.editing import as_pixels, from_vae
from edgediff_runtime.inversion import Inverted
from edgediff_runtime.loop import Step
from edgediff_runtime.sessions import Array

MODEL = "drawings-64"
STYLES = ("fluent 3d", "fluent flat", "noto", "twemoji")
STRENGTHS = (0.3, 0.6, 0.9)
COUNT, PLANNED, SEED, TOP = 32, 16, 1, 5
INVERSION_STEPS = 20
WANTED, INVERTED = 30.0, 25.0  # dB
EXACT, HALF = 60.0, 35.0  # dB
WHAT = ("edits", "periods", "inversion", "injection", "control")
ROUNDS = 7
COSTS, LARGE = ("control-cost", "lora-cost"), "sd15"
RANKS = (8, 32)
PERIODS = (2, 3, 4, 6)
SHARES = (0.2, 0.3)  # of the steps, less than the authors'
RELATED = (
    ("red apple, fluent 3d", "green apple, fluent 3d"),
    ("dog face, noto", "fox, noto"),
    ("rocket, fluent flat", "airplane, fluent flat"),
    ("cat face, fluent 3d", "tiger face, fluent 3d"),
    ("house, noto", "church, noto"),
    ("sun, twemoji", "flower, twemoji"),
)


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", choices=(*WHAT, *COSTS), default=WHAT)
    parser.add_argument("--images", type=Path, help="captioned drawings that are inverted too")
    parser.add_argument("--sheet", type=Path, help="a PNG of the first edits: source, clock 1, clock 2")
    parser.add_argument("--injected", type=Path, help="a PNG of some: source, without injection, clock 1, clock 2")
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latent, for the costs")
    parser.add_argument("--rounds", type=int, default=7, help="for the costs")
    given = parser.parse_args()
    print(machine())
    if "control" in given.what:
        show_control()
    if set(given.what) <= {"control"}:
        return
    with tempfile.TemporaryDirectory() as scratch:
        for what, show in zip(COSTS, (show_control_cost, show_lora_cost), strict=True):
            if what in given.what:
                show(Path(scratch), given.side, given.rounds)
        if not {*WHAT} & {*given.what}:
            return
        bundles = {
            kind: exported(MODEL, Path(scratch) / kind, adaptor=adaptor)
            for kind, adaptor in (("learned", None), ("identity", "identity"))
        }
        pipes = {kind: EdgePipeline.from_pretrained(path) for kind, path in bundles.items()}
        if "edits" in given.what:
            show_edits(pipes, given.sheet)
        if "periods" in given.what:
            show_periods(pipes["identity"])
        if "inversion" in given.what:
            show_inversion(pipes["learned"], given.images)
        if "injection" in given.what:
            for kind, adaptor in (("learned", None), ("identity", "identity")):
                bundle = exported(MODEL, Path(scratch) / f"injection-{kind}", adaptor=adaptor, injection=True)
                show_injection(kind, EdgePipeline.from_pretrained(bundle), given.injected if adaptor is None else None)


def every_thing() -> list[str]:
    """The things that the model has drawn in training."""
    known = (FOLDER / MODEL / "things.txt").read_text(encoding="utf-8").split("\n")
    return [name for name in known if name.strip()]


def things(count: int) -> list[str]:
    """Some of them, in a seeded order."""
    return [str(name) for name in np.random.default_rng(SEED).permutation(every_thing())[:count]]


def edits_of(count: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts of pictures, those of what they become in the same style, and the things that these name."""
    named = things(2 * count)
    styles = [STYLES[i % len(STYLES)] for i in range(count)]
    before, after = (
        [f"{name}, {style}" for name, style in zip(half, styles, strict=True)]
        for half in (named[:count], named[count:])
    )
    return before, after, named[count:]


def show_edits(pipes: dict[str, EdgePipeline], sheet: Path | None) -> None:
    """Clock 2 against clock 1 at each strength: dB of pixels, what a classifier sees, operations saved."""
    before, after, wanted = edits_of(COUNT)
    sources = pipes["learned"](prompt=before, clock=1, seed=SEED).images
    print(f"{COUNT} edits of pictures that the model drew, 8 steps, guidance {guidance(pipes):g}")
    rows = [sources[:8]]
    for strength in STRENGTHS:
        asked: dict[str, Any] = {"prompt": after, "image": sources, "strength": strength, "seed": SEED + 1}
        always = pipes["learned"](**asked, clock=1)
        rows.append(always.images[:8])
        print(f" strength {strength:g}, clock 1 ({letters(always.mask)}): {seen(always.images, wanted)}")
        for kind, pipe in pipes.items():
            clocked = pipe(**asked, clock=2)
            assert always.pixels is not None
            assert clocked.pixels is not None
            near = [psnr_db(a, b) for a, b in zip(always.pixels, clocked.pixels, strict=True)]
            found = f"{np.mean(near):.1f} dB (10 %: {np.percentile(near, 10):.1f})"
            if kind == "learned":
                rows.append(clocked.images[:8])
            bar = f"; {WANTED:g} wanted: {verdict(np.mean(near) >= WANTED)}" if strength == 0.6 else ""
            told = f"{seen(clocked.images, wanted)}, {clocked.flops_saved:.1%} of the FLOPs saved{bar}"
            print(f"  clock 2 ({letters(clocked.mask)}), {kind}: {found} of clock 1, {told}")
    if sheet is not None:
        save_sheet(rows, sheet)


def show_control() -> None:
    """Pictures by control images against diffusers' own, guidance 5, 8 steps at clock 1: dB of pixels."""
    # First, since a module of theirs has the name of a benchmark.
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from edits import PROMPT, SAMPLERS, SIZE, against, ours, picture, theirs

    one, two = picture(), [picture(), picture(3)]
    image, scale = "control_image", "controlnet_conditioning_scale"
    # For each kind our words, what diffusers is told besides, and which of ours it is not told.
    single = ({image: one, scale: 0.8}, {"image": one}, (image,))
    pair = ({image: two, scale: [1.0, 0.5]}, {"image": two}, (image,))
    adapted = ({image: one, scale: 0.8}, {"image": one, "adapter_conditioning_scale": 0.8, **SIZE}, (image, scale))
    # diffusers' XL pipeline counts steps, and would leave the features out of PNDM's last call.
    every = (adapted[0], adapted[1] | {"adapter_conditioning_factor": 2.0}, adapted[2])
    cases: tuple[tuple[str, str, dict[str, Any], str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]], ...] = (
        ("a ControlNet", "sd1", {"control": 1}, "ControlNet", single),
        ("a ControlNet", "xl", {"control": 1}, "ControlNet", single),
        ("two ControlNets", "sd1", {"control": 2}, "ControlNet", pair),
        ("two ControlNets", "xl", {"control": 2}, "ControlNet", pair),
        ("a T2I-Adapter", "sd1", {"adapter": "full_adapter"}, "Adapter", adapted),
        ("a T2I-Adapter", "sd1-levels", {"adapter": "light_adapter"}, "Adapter", adapted),
        ("a T2I-Adapter", "xl-levels", {"adapter": "full_adapter_xl"}, "Adapter", every),
    )
    backends = (("torch", SAMPLERS, EXACT), ("onnxruntime", SAMPLERS, EXACT), ("mil-reference", ("dpmpp_2m",), HALF))
    for title, name, steering, pipeline, (said, told, without) in cases:
        xl = "XL" * name.startswith("xl")
        kind = getattr(diffusers, f"StableDiffusion{xl}{pipeline}Pipeline")
        for backend, samplers, bar in backends:
            found = {}
            for sampler in samplers:
                other = theirs(name, sampler, kind, **steering)
                asked = {"prompt": PROMPT, "guidance_scale": 5.0, **said}
                found[sampler] = against(ours(name, sampler, backend, **steering), other, asked, told, without)
            spelt = ", ".join(f"{sampler} {number:.1f}" for sampler, number in found.items())
            print(f"{title}, {name}, {steering}, {backend}: {spelt} dB; {bar:g} wanted: "
                  f"{verdict(min(found.values()) >= bar)}", flush=True)  # fmt: skip


def guidance(pipes: dict[str, EdgePipeline]) -> float:
    """That of the bundles."""
    return pipes["learned"].manifest.operating_point.guidance_scale


def seen(images: Array, wanted: Sequence[str]) -> str:
    """How many of the pictures the classifier takes for what they should show."""
    folder = built_in(MODEL)
    assert folder is not None
    classifier = load_classifier(folder / "classifier")
    known = classifier.shape.labels
    with torch.no_grad():
        scores = classifier(as_input(images))[0].numpy()
    ranks = ranks_of(scores, np.array([known.index(name) for name in wanted]))
    return f"{np.mean(ranks <= TOP):.0%} in the top {TOP}"


def show_periods(pipe: EdgePipeline) -> None:
    """How near each period of the clock comes to clock 1 at each strength: are fewer full steps needed at less?"""
    before, after, _ = edits_of(PLANNED)
    sources = pipe(prompt=before, clock=1, seed=SEED).images
    print(
        f"{PLANNED} pictures, {INVERSION_STEPS} steps, identity adaptor: dB of pixels to clock 1, full of the steps run"
    )
    for strength in (None, *reversed(STRENGTHS)):
        asked: dict[str, Any] = {"prompt": after, "seed": SEED + 1, "num_inference_steps": INVERSION_STEPS}
        asked |= {} if strength is None else {"image": sources, "strength": strength}
        always = pipe(**asked, clock=1).pixels
        assert always is not None
        told = []
        for period in PERIODS:
            made = pipe(**asked, clock=period)
            told.append(f"clock {period} {near(always, made):.1f} ({sum(made.mask)} of {len(made.mask)})")
        print(f" {'from noise' if strength is None else f'strength {strength:g}'}: {', '.join(told)}")


def show_inversion(pipe: EdgePipeline, images: Path | None) -> None:
    """DDIM backwards and forwards again: dB of the latents, and of the pixels against the decoded latents."""
    names = things(COUNT)
    prompts = [f"{name}, {STYLES[i % len(STYLES)]}" for i, name in enumerate(names)]
    sets = {"drawn by the model": (pipe(prompt=prompts, clock=1, seed=SEED).images, prompts)}
    if images is not None:
        listed = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
        held = [each for each in listed if each["split"] == "test"]
        chosen = [held[i] for i in np.random.default_rng(0).choice(len(held), COUNT, replace=False)]
        opened = [np.asarray(Image.open(images / each["file_name"]).convert("RGB")) for each in chosen]
        sets["real, held out"] = (np.stack(opened), [each["text"] for each in chosen])
    for title, (pictures, texts) in sets.items():
        (encoded,) = pipe._encode([as_pixels(pictures)], pipe._usage())
        assert pipe.manifest.vae is not None
        latents = from_vae(pipe.manifest.vae, encoded)
        decoded = pipe.decode(latents)
        best = np.mean([psnr_db(a, b) for a, b in zip(as_pixels(pictures), decoded, strict=True)])
        print(f"{COUNT} drawings {title}, {INVERSION_STEPS} steps; the autoencoder alone {best:.1f} dB")
        for refinements in (0, 1, 2):
            for clocks in ((1, 1), (1, 2), (2, 2)):
                asked: dict[str, Any] = {"prompt": texts, "num_inference_steps": INVERSION_STEPS, "guidance_scale": 1.0}
                found = pipe.invert(pictures, refinements=refinements, clock=clocks[0], **asked)
                again = pipe(latents=found.latents, scheduler="ddim", clock=clocks[1], **asked)
                assert again.pixels is not None
                near = np.mean([psnr_db(a, b) for a, b in zip(latents, again.latents, strict=True)])
                seen_again = np.mean([psnr_db(a, b) for a, b in zip(decoded, again.pixels, strict=True)])
                bar = f" ({INVERTED:g} wanted: {verdict(near >= INVERTED)})" if clocks == (1, 1) and refinements else ""
                print(
                    f"  {refinements} refinements, inverted at clock {clocks[0]}, drawn at clock {clocks[1]}: latents "
                    f"{near:.1f} dB, pixels {seen_again:.1f} dB of the decoded ones; saved {found.flops_saved:.0%} "
                    f"and {again.flops_saved:.0%}{bar}"
                )


def show_injection(kind: str, pipe: EdgePipeline, sheet: Path | None) -> None:
    """Plug-and-play at clock 1 and 2: how near pictures are, what they show, what is left of the source, the cost."""
    before, after, wanted = edits_of(COUNT)
    sources = pipe(prompt=before, clock=1, seed=SEED).images
    told = f"{INVERSION_STEPS} steps (1 refinement), drawn as something else, guidance 5"
    print(f"{kind} adaptor: {COUNT} drawings inverted in {told}")

    def invert(clock: int, count: int = COUNT) -> Inverted:
        return pipe.invert(
            sources[:count], prompt=before[:count], clock=clock, num_inference_steps=INVERSION_STEPS, refinements=1
        )

    def draw(found: Inverted, clock: int, count: int = COUNT) -> Result:
        return pipe(prompt=after[:count], inverted=found, clock=clock, guidance_scale=5.0)

    plain = pipe(
        prompt=after, latents=invert(1).latents, scheduler="ddim", clock=1, guidance_scale=5.0,
        num_inference_steps=INVERSION_STEPS,
    )  # fmt: skip
    told = f"{seen(plain.images, wanted)}, {kept(sources, plain):.2f} with the source's edges"
    print(f"  without injection, clock 1: {told}")
    first: Result | None = None
    always = 0
    for clocks in ((1, 1), (1, 2), (2, 2)):
        found = invert(clocks[0])
        made = draw(found, clocks[1])
        first = made if first is None else first
        assert first.pixels is not None
        spent = operations(pipe, found.ledger) + operations(pipe, made.ledger)
        always = spent if clocks == (1, 1) else always
        print(
            f"  inverted at clock {clocks[0]}, drawn at {clocks[1]}: {near(first.pixels, made):.1f} dB of clock 1, "
            f"{seen(made.images, wanted)}, {kept(sources, made):.2f} with the source's edges; "
            f"{1 - spent / always:.1%} of the FLOPs saved ({found.flops_saved:.1%} and {made.flops_saved:.1%})"
        )
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS + 1):
        for clock, taken in times.items():
            begin = perf_counter()
            draw(invert(clock, 1), clock, 1)
            taken.append(perf_counter() - begin)
    ratios = np.array(times[2][1:]) / np.array(times[1][1:])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    one = np.median(times[1][1:])
    print(
        f"  one picture, both ways, {ROUNDS} rounds in turns: clock 1 {one:.2f} s; clock 2 {middle:.2f} [{low:.2f}, "
        f"{high:.2f}] times as long"
    )
    found = invert(1)
    for share in SHARES:
        asked: dict[str, Any] = {"inject_attention": share, "inject_features": share}
        made = pipe(prompt=after, inverted=found, clock=1, guidance_scale=5.0, **asked)
        told = f"{seen(made.images, wanted)}, {kept(sources, made):.2f} with the source's edges"
        print(f"  both for {share:.0%} of the steps, clock 1: {told}")
    if sheet is not None:
        save_sheet(related(pipe), sheet)


def related(pipe: EdgePipeline) -> list[Array]:
    """Drawings, and what comes of related words: with the same noise alone, and injected at clock 1 and 2."""
    before, after = ([pair[i] for pair in RELATED] for i in (0, 1))
    drawn = pipe(prompt=before, clock=1, seed=3).images
    found = pipe.invert(drawn, prompt=before, num_inference_steps=INVERSION_STEPS, refinements=1)
    asked: dict[str, Any] = {"prompt": after, "guidance_scale": 5.0}
    plain: dict[str, Any] = {
        "latents": found.latents,
        "scheduler": "ddim",
        "num_inference_steps": INVERSION_STEPS,
        "clock": 1,
    }
    return [
        drawn,
        pipe(**asked, **plain).images,
        *(pipe(inverted=found, clock=clock, **asked).images for clock in (1, 2)),
    ]


def near(wanted: Array, made: Result) -> float:
    """Mean dB of pictures."""
    assert made.pixels is not None
    return float(np.mean([psnr_db(a, b) for a, b in zip(wanted, made.pixels, strict=True)]))


def kept(sources: Array, made: Result) -> float:
    """Mean correlation of the edges of pictures, the sizes of their gradients, with those of others: the layout."""
    both = [np.hypot(*np.gradient(each.mean(axis=3, dtype=np.float64), axis=(1, 2))) for each in (sources, made.images)]
    return correlation(*both)


def correlation(ones: Array, others: Array) -> float:
    """Mean correlation of pictures with others."""
    return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ones, others, strict=True)]))


def operations(pipe: EdgePipeline, ledger: Sequence[Step]) -> int:
    """Multiply-adds of an image in the UNet, attention matmuls included."""
    cost = {name: each.macs + each.macs_attention for name, each in pipe.manifest.cost.items()}
    return sum(step.rows * cost["full" if step.full else "cached"] for step in ledger)


def save_sheet(rows: Sequence[Array], path: Path) -> None:
    """Rows of pictures as one, twice as large."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(grid.repeat(2, axis=0).repeat(2, axis=1)).save(path)


def show_control_cost(scratch: Path, side: int, rounds: int) -> None:
    """What a ControlNet costs in a full and in a cached step, by graphs, of a guided image."""
    beside = scratch / "controlnet"
    save_random_controlnet(beside)
    without, steered = large(scratch / "without", side), large(scratch / "with", side, control=(str(beside),))
    calls = {
        "without a ControlNet": Call.of(two_steps, bundle=without, steered=False),
        "with one": Call.of(two_steps, bundle=steered, steered=True),
    }
    show_cost(calls, side, rounds)


def show_lora_cost(scratch: Path, side: int, rounds: int) -> None:
    """What low-rank factors as inputs cost in a full and in a cached step of a guided image, one rank after another."""
    fused = Call.of(two_steps, bundle=large(scratch / "fused", side, layout="pair"), steered=False)
    for rank in RANKS:
        bundle = large(scratch / f"rank-{rank}", side, layout="pair", lora_inputs=rank)
        show_cost({"fused": fused, f"rank {rank}": Call.of(two_steps, bundle=bundle, steered=False)}, side, rounds)
        shutil.rmtree(bundle)


def large(bundle: Path, side: int, control: tuple[str, ...] = (), **recipe: Any) -> str:
    """Exports the large geometry with random weights, whose steps are to be timed."""
    config = edgediff.ExportConfig(
        **{"adaptor": "identity", "layout": "split", "steps": 2, "random_weights": 0, "sizes": (f"{side}x{side}",)}
        | {"verify": VerifyConfig(mode="graphs"), "control": control}
        | recipe
    )
    edgediff.export_bundle(edgediff.load_model(LARGE, control=control), bundle, config)
    return str(bundle)


def show_cost(calls: dict[str, Call], side: int, rounds: int) -> None:
    """Times steps in turns, and sets them against those of the first."""
    runners = in_turns(calls, rounds)
    print(f"{LARGE}, latents of {side} x {side}, 2 rows, {rounds} rounds in turns; ms, medians [10th, 90th percentile]")
    base = next(iter(runners.values()))
    for name, runner in runners.items():
        print(f" {name}: " + ", ".join(f"{part} {spread(ms)}" for part, ms in runner.parts.items()))
        if runner is not base:
            told = [f"{part} {spread(ratios(runner.parts[part], base.parts[part]))}" for part in ("full", "cached")]
            print(f"  of the first: {', '.join(told)}")


def save_random_controlnet(folder: Path) -> None:
    """A ControlNet of the large model's size; its last convolutions, zero before a training, are random too."""
    torch.manual_seed(SEED)
    net = ControlNetModel.from_unet(edgediff.load_model(LARGE).unet, load_weights_from_unet=False)
    for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(convolution.weight, std=0.02)
    net.save_pretrained(folder)


def two_steps(bundle: str, steered: bool) -> Iterator[Said]:
    """Each turn is a full and a cached step; nothing is checked but that results are finite, which the loop does."""
    pipe = EdgePipeline.from_pretrained(bundle)
    (text,) = pipe.manifest.conditioning.tensors[:1]
    tokens, width = (77 if isinstance(size, str) else size for size in text.shape[1:])
    asked: dict[str, Any] = {"seed": SEED, "clock": 2, "num_inference_steps": 2, "guidance_scale": 7.5}
    for draw, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        asked[name] = noise(SEED, (tokens, width), image=0, draw=draw)[None]
    if steered:
        (shape,) = (t.shape for g in pipe.session.graphs for t in g.inputs if t.name == "control_image")
        squares = np.indices(tuple(map(int, shape[2:]))).sum(0) // 32 % 2 * 255
        asked["control_image"] = np.repeat(squares[:, :, None], 3, axis=2).astype(np.uint8)
    if pipe.manifest.lora is not None:
        asked["lora"] = drawn_lora(pipe.manifest.lora)
    pipe(**asked)
    yield Said()
    while True:
        result = pipe(**asked)
        yield Said(parts=parts_of([(step.full, step.ms) for step in result.ledger], {}, "loop"))


if __name__ == "__main__":
    main()
