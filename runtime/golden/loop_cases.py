"""The loop's known answers: fake graphs of small matrices, and a plain computation that knows of no batches.

Every image, and every row of it, is computed alone, in the order in which the contract (runtime/README.md) says what a
step does. A runtime computes rows together, pads them, keeps its cache in tables of its own: it must come to the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from edgediff_runtime.noise import noise
from edgediff_runtime.schedulers import SchedulerConfig, make_scheduler

SHAPE = (2, 2, 2)
SIZE = 8
FEATURE = (3, 1, 1)
EMBEDDING = (1, 2)
ROWS = ("attention_rows", "feature_rows")
DDIM = SchedulerConfig(name="ddim")
DPM = SchedulerConfig(name="dpmpp_2m")
STOCHASTIC = SchedulerConfig(name="ddim", eta=1.0)
HEUN = SchedulerConfig(name="heun", beta_end=0.002)
PNDM = SchedulerConfig(name="pndm", steps_offset=1)
UNIPC = SchedulerConfig(name="unipc", timestep_spacing="leading")
LCM = SchedulerConfig(name="lcm")


def _matrix(rows: int, columns: int, image: int) -> np.ndarray:
    """Multiples of 1/64 below 1/2: float32 holds them exactly, and sums stay small."""
    drawn = noise(7, (rows, columns), image=image)
    made: np.ndarray = np.clip(np.rint(drawn * 8), -31, 31).astype(np.float32) / 64
    return made


def fake_graphs(
    concat: int = 0, split: bool = True, steered: bool = False, injects: bool = False
) -> list[dict[str, Any]]:
    """The four parts, or a full and a cached step: each output is a sum of matrices times flattened inputs.

    Args:
        concat: Channels that are concatenated to the sample.
        split: Whether the parts are apart.
        steered: Whether a ControlNet is before them.
        injects: Whether rows take other rows' inputs.
    """
    taken = SIZE + 4 * concat
    parts = {
        "highres_in": {
            "highres_feature": (FEATURE, {"sample": _matrix(3, taken, 0), "timestep": _matrix(3, 1, 1) / 256}),
            "skip_0": (SHAPE, {"sample": _matrix(SIZE, taken, 2)}),
        },
        "lowres": {
            "lowres_feature": (
                FEATURE, {"highres_feature": _matrix(3, 3, 3), "encoder_hidden_states": _matrix(3, 2, 4)},
            )
        },
        "adaptor": {
            "lowres_feature": (FEATURE, {"highres_feature": _matrix(3, 3, 5), "cache": _matrix(3, 3, 6)})
        },
        "highres_out": {
            "out_sample": (SHAPE, {"skip_0": _matrix(SIZE, SIZE, 7), "lowres_feature": _matrix(SIZE, 3, 8)})
        },
    }  # fmt: skip
    before = []
    if steered:
        given = {"sample": _matrix(SIZE, taken, 9), "control_image": _matrix(SIZE, SIZE, 10)}
        before = [_graph("controlnet", "full_step", [{"control_0": (SHAPE, given)}])]
        shape, terms = parts["highres_out"]["out_sample"]
        parts["highres_out"]["out_sample"] = (shape, {**terms, "control_0": _matrix(SIZE, SIZE, 11)})
    if injects:
        parts["lowres"]["lowres_feature"][1]["highres_feature@attention_rows"] = _matrix(3, 3, 12)
        parts["highres_out"]["out_sample"][1]["skip_0@feature_rows"] = _matrix(SIZE, SIZE, 13)
    if split:
        frequency = {"highres_in": "step", "lowres": "full_step", "adaptor": "cached_step", "highres_out": "step"}
        return before + [_graph(name, frequency[name], [outputs]) for name, outputs in parts.items()]
    steps = {"full": ("full_step", "lowres"), "cached": ("cached_step", "adaptor")}
    return [
        _graph(name, when, [parts["highres_in"], parts[inside], parts["highres_out"]])
        for name, (when, inside) in steps.items()
    ]


def _graph(name: str, frequency: str, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """A graph as JSON has it: what it takes, and its tensors in the order in which they are computed.

    A term ``tensor@rows`` is of the row that ``rows`` names, for each row.
    """
    made = [tensor for stage in stages for tensor in stage]
    named = [source for stage in stages for _, terms in stage.values() for source in terms]
    taken = [part for source in named for part in source.split("@") if part not in made]
    compute = [
        {
            "tensor": tensor,
            "shape": list(shape),
            "terms": [_term(source, matrix) for source, matrix in terms.items()],
        }
        for stage in stages
        for tensor, (shape, terms) in stage.items()
    ]
    gives = made if len(stages) == 1 else ["out_sample", "lowres_feature"]
    return {"name": name, "frequency": frequency, "inputs": list(dict.fromkeys(taken)), "outputs": gives,
            "compute": compute}  # fmt: skip


def _term(source: str, matrix: np.ndarray) -> dict[str, Any]:
    tensor, _, rows = source.partition("@")
    return {"of": tensor, **({"rows": rows} if rows else {}), "matrix": matrix.tolist()}


def run_graph(graph: Mapping[str, Any], rows: Sequence[dict[str, np.ndarray]]) -> None:
    """Computes a fake graph on rows, each a table of tensors by name, and adds its outputs to them."""
    tables = [dict(row) for row in rows]
    for each in graph["compute"]:
        made = []
        for table in tables:
            total = 0
            for term in each["terms"]:
                other = tables[int(table[term["rows"]])] if "rows" in term else table
                total = total + np.array(term["matrix"]) @ np.asarray(other[term["of"]], dtype=np.float64).reshape(-1)
            made.append(np.reshape(total, each["shape"]))
        for table, value in zip(tables, made, strict=True):
            table[each["tensor"]] = value
    for row, table in zip(rows, tables, strict=True):
        row.update({name: table[name] for name in graph["outputs"]})


@dataclass(frozen=True)
class LoopCase:
    """One generation of the fake graphs."""

    scheduler: SchedulerConfig = DDIM
    steps: int = 5
    mask: tuple[int, ...] = (1, 0, 1, 0, 1)
    guidance: tuple[float, ...] = (1.0,) * 5
    images: int = 1
    batch: int | None = None
    start: int = 0
    concat: int = 0
    split: bool = True
    seed: int = 3
    image_guidance: float | None = None
    keeps: bool = False
    steered: bool = False
    injects: bool = False
    source_calls: tuple[int, int] | None = None


CASES = {
    "one_image": LoopCase(),
    "pair": LoopCase(split=False),
    "clock_1": LoopCase(mask=(1,) * 5),
    "mask": LoopCase(mask=(1, 0, 0, 0, 1)),
    "second_order": LoopCase(scheduler=DPM),
    "guided": LoopCase(guidance=(3.0,) * 5, images=2),
    "guided_pair": LoopCase(guidance=(3.0,) * 5, images=2, split=False),
    "guidance_ends_on_a_cached_step": LoopCase(guidance=(3.0, 3.0, 3.0, 1.0, 1.0), images=2),
    "guidance_begins_on_a_cached_step": LoopCase(guidance=(1.0, 3.0, 3.0, 3.0, 3.0), images=2),
    "batch_2_of_3_images": LoopCase(images=3, batch=2),
    "batch_2_guided": LoopCase(guidance=(2.0,) * 5, images=3, batch=2),
    "batch_4_padded": LoopCase(guidance=(2.0,) * 5, images=3, batch=4),
    "batch_1": LoopCase(guidance=(2.0,) * 5, images=2, batch=1),
    "fresh_noise": LoopCase(scheduler=STOCHASTIC, images=2),
    "fresh_noise_of_lcm": LoopCase(scheduler=LCM, images=2),
    "two_calls_a_step": LoopCase(scheduler=HEUN, steps=3, mask=(1, 0, 1, 0, 0), guidance=(2.0,) * 5),
    "two_calls_in_the_first_step": LoopCase(scheduler=PNDM, steps=4),
    "starts_at_2_with_a_corrector": LoopCase(scheduler=UNIPC, start=2),
    "starts_at_2": LoopCase(start=2, images=2),
    "starts_on_a_cached_step": LoopCase(start=1, guidance=(2.0,) * 5, scheduler=DPM),
    "concatenated_channels": LoopCase(concat=1, guidance=(2.0,) * 5, images=2),
    "guided_by_an_image": LoopCase(concat=1, guidance=(2.0,) * 5, image_guidance=1.5, images=2),
    "guided_by_an_image_pair": LoopCase(concat=1, guidance=(2.0,) * 5, image_guidance=1.5, images=2, split=False),
    "guided_by_an_image_until_a_cached_step": LoopCase(
        concat=1, guidance=(2.0, 2.0, 2.0, 1.0, 1.0), image_guidance=1.5, images=2
    ),
    "guided_by_an_image_in_batches_of_2": LoopCase(
        concat=1, guidance=(1.0, 2.0, 2.0, 2.0, 2.0), image_guidance=0.0, images=3, batch=2
    ),
    "keeps_what_the_mask_leaves": LoopCase(keeps=True, images=2, guidance=(2.0,) * 5),
    "keeps_what_the_mask_leaves_from_2": LoopCase(keeps=True, images=2, start=2, scheduler=DPM),
    "steered": LoopCase(steered=True, images=2, guidance=(2.0,) * 5, mask=(1, 0, 0, 1, 0)),
    "injects_nothing": LoopCase(injects=True, images=2, guidance=(2.0,) * 5),
    "injected": LoopCase(injects=True, images=2, guidance=(2.0,) * 5, source_calls=(2, 3)),
    "injected_without_guidance": LoopCase(injects=True, source_calls=(4, 1), mask=(1, 1, 0, 1, 0)),
    "injected_in_batches_of_3": LoopCase(
        injects=True, images=2, guidance=(2.0, 2.0, 2.0, 1.0, 1.0), source_calls=(3, 0), batch=3
    ),
    "keeps_with_noise_in_sigma": LoopCase(keeps=True, start=2, steps=3, mask=(1, 1, 1, 0, 1), scheduler=HEUN),
}


def inputs_of(case: LoopCase) -> dict[str, Any]:
    """What a case is given: latents at the start's noise level, embeddings of both halves, concatenated channels."""

    def drawn(shape: tuple[int, ...], draw: int) -> np.ndarray:
        return np.stack([noise(case.seed, shape, image=n, draw=draw) for n in range(case.images)])

    return {
        "latents": drawn(SHAPE, 0),
        "cond": drawn(EMBEDDING, 1001),
        "uncond": drawn(EMBEDDING, 1002),
        "concat": drawn((case.concat, *SHAPE[1:]), 1003) if case.concat else None,
        "control_image": drawn(SHAPE, 1006) if case.steered else None,
        "kept": {
            "mask": (drawn((1, *SHAPE[1:]), 1004) > 0).astype(np.float32),
            "latents": drawn(SHAPE, 1005),
            "noise": drawn(SHAPE, 0),
        }
        if case.keeps
        else None,
        "source": {
            "latents": np.stack([drawn(SHAPE, 1007 + i) for i in range(case.steps)]),
            "cond": drawn(EMBEDDING, 1100),
            "calls": dict(zip(ROWS, case.source_calls, strict=True)),
        }
        if case.source_calls is not None
        else None,
    }


def answer(case: LoopCase) -> dict[str, Any]:
    """Computes a case image by image."""
    graphs = fake_graphs(case.concat, case.split, case.steered, case.injects)
    given = inputs_of(case)
    scheduler = make_scheduler(case.scheduler, case.steps)
    mask: list[int] = []
    latents = []
    for n in range(case.images):
        x_t, state, caches, names_before = given["latents"][n][None], None, {}, set()
        mask = []
        steps = []
        for i in range(case.start, len(scheduler.timesteps)):
            guided = case.guidance[i] > 1
            # By what a row is told: neither text nor image, the image alone, both; before them the source.
            halves = ("uncond", "image", "cond") if case.image_guidance is not None else ("uncond", "cond")
            source = given["source"]
            is_drawn = source is not None and i < max(source["calls"].values())
            names = (*(("source",) if is_drawn else ()), *(halves if guided else ("cond",)))
            full = bool(case.mask[i]) or i == case.start or not set(names) <= names_before
            names_before = set(names)
            mask.append(int(full))
            scaled = scheduler.scale_model_input(i, x_t)[0]
            rows = {}
            for place, half in enumerate(names):
                sample = source["latents"][i, n] if half == "source" else scaled
                if given["concat"] is not None:
                    beside = given["concat"][n]
                    if half == "uncond" and case.image_guidance is not None:
                        beside = np.zeros_like(beside)
                    sample = np.concatenate([sample, beside])
                told = source["cond"][n] if half == "source" else given["cond" if half == "cond" else "uncond"][n]
                row = {"sample": sample, "timestep": np.array([scheduler.timesteps[i]]),
                       "encoder_hidden_states": told, **caches.get(half, {})}  # fmt: skip
                if given["control_image"] is not None:
                    row["control_image"] = given["control_image"][n]
                for name in ROWS if case.injects else ():
                    row[name] = np.array(0 if is_drawn and i < source["calls"][name] else place)
                rows[half] = row
            for graph in graphs:
                if graph["frequency"] in ("step", "full_step" if full else "cached_step"):
                    run_graph(graph, list(rows.values()))
            for half, row in rows.items():
                caches[half] = {"cache": row["lowres_feature"], "lowres_feature": row["lowres_feature"]}
                caches[half] |= {name: row[name] for name in ("control_0",) if name in row}
            out = {half: row["out_sample"].astype(np.float32) for half, row in rows.items()}
            model_output = out["cond"]
            if guided and case.image_guidance is None:
                model_output = out["uncond"] + np.float32(case.guidance[i]) * (out["cond"] - out["uncond"])
            elif guided:
                towards = np.float32(case.image_guidance) * (out["image"] - out["uncond"])
                model_output = out["uncond"] + towards + np.float32(case.guidance[i]) * (out["cond"] - out["image"])
            fresh = noise(case.seed, SHAPE, image=n, draw=i + 1)[None] if scheduler.needs_noise else None
            x_t, state = scheduler.step(i, x_t, model_output[None], state, fresh, i == case.start)
            if given["kept"] is not None:
                mask_n, clean, hidden_by = (given["kept"][name][n] for name in ("mask", "latents", "noise"))
                stays = scheduler.add_noise(i + 1, clean, hidden_by)
                x_t = np.where(mask_n > 0, x_t, stays[None])
            steps.append(x_t[0])
        latents.append(np.stack(steps))
    return {"mask": mask, "latents": np.stack(latents, axis=1)}


def document(case: LoopCase) -> dict[str, Any]:
    """A case as JSON has it; arrays flat in C order."""
    given = inputs_of(case)
    made = answer(case)
    return {
        "scheduler": msgspec.to_builtins(case.scheduler),
        "num_inference_steps": case.steps,
        "clock": list(case.mask),
        "guidance": list(case.guidance),
        "num_images": case.images,
        "batch": case.batch,
        "start": case.start,
        "seed": str(case.seed),
        "shape": list(SHAPE),
        **{name: value for name, value in given.items() if value is not None},
        **({} if case.image_guidance is None else {"image_guidance": case.image_guidance}),
        "graphs": fake_graphs(case.concat, case.split, case.steered, case.injects),
        "mask": made["mask"],
        "steps": [{"latents": latents} for latents in made["latents"]],
    }
