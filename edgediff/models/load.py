"""A trained model from disk, a directory or a single file: a UNet with what it needs to be sampled.

The network is built and tried on the meta device and takes the loaded tensors as they are: loading costs the weights
once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel, UNet2DModel

from edgediff.errors import ConfigError, EdgediffError, ModelError, UnsupportedError
from edgediff.models.card import Card, read_card
from edgediff.models.clip_tokenizer import load_tokenizer, tokenizer_folder
from edgediff.models.component_loading import empty_text_encoder
from edgediff.models.conditioning import Conditioning, TensorSpec, read_conditioning
from edgediff.models.controlnet import Control, load_control
from edgediff.models.embedding import StepEmbedding
from edgediff.models.injection import ROW_TENSORS
from edgediff.models.lora import TEXT, UNET, Lora, read_spec
from edgediff.models.model_files import (
    BAD_SETTINGS,
    check_weights,
    file_sha256,
    fill,
    read_json,
    read_state,
    weight_files,
)
from edgediff.models.sampling import USUAL, is_for_few_steps, own_sampler, scheduler_class
from edgediff.models.single_file import SingleFile, check_file, open_single_file
from edgediff.models.slim import plain_config
from edgediff.models.spectral import SPECTRAL
from edgediff.models.t2i_adapter import Adapter, find_t2i_adapter
from edgediff.models.textual_inversion import Embedding, check_tokens, read_embedding, rows_of
from edgediff.models.undivided import predict
from edgediff.zoo import ZOO, built_in, no_model
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import GUIDANCE, Concatenated

UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel, **SPECTRAL}
# Classes of diffusers' pipelines whose UNet and components are handled; the last is that of models trained here.
PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline", "StableDiffusionDepth2ImgPipeline", "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline", "LDMPipeline", "LDMTextToImagePipeline", "DDPMPipeline", "DDIMPipeline",
    "PNDMPipeline", "DiffusionPipeline",
)  # fmt: skip
SCHEDULER_FILES = ("scheduler/scheduler_config.json", "scheduler_config.json")
# Settings that say how often something is built or listed: a huge one would take hours, or all memory.
COUNTS = {
    "layers_per_block": 100,
    "transformer_layers_per_block": 100,
    "reverse_transformer_layers_per_block": 100,
    "num_class_embeds": 2**20,
    "num_train_timesteps": 2**20,
}
MAX_SIDE = 2**16


@dataclass(frozen=True)
class Model:
    """A trained diffusion UNet, ready to be split, exported and sampled.

    Attributes:
        name: Built-in name, the repository's in the Hugging Face cache, or the directory's.
        unet: The network in evaluation mode, float32; on the meta device where a geometry has no weights.
        scheduler: diffusers' scheduler as the model was saved with it; None where the directory has none: such a model
            can be counted, not sampled.
        space: ``pixel`` where the UNet works on images, ``latent`` where a decoder comes after it.
        sha256: Hash over configuration and weights; a bundle is compared with it.
        path: The directory or the file that it came from.
        home: Where the configurations of the components are: ``path``, the directory around it, or edgediff's own for
            a single file.
        single: The single file that the weights come from, or None.
        vae: What replaces the pipeline's autoencoder: a directory or a file, or None.
        preview: The small autoencoder whose decoder makes previews: a directory or a file, or None.
        control: The ControlNets that steer the UNet.
        t2i_adapter: The T2I-Adapter whose features the UNet takes, or None.
        lora: What was fused into the UNet, and is fused into the text encoders when they are loaded.
        embedding: What is added to the tokenizers and the text encoders when they are loaded.
        size: Height and width of the sample in place of the configuration's.
        injects: Whether it is divided for plug-and-play injection.
    """

    name: str
    unet: UNet2DModel | UNet2DConditionModel
    scheduler: SchedulerMixin | None
    conditioning: Conditioning
    space: Literal["pixel", "latent"]
    card: Card
    sha256: str
    path: Path
    home: Path
    single: SingleFile | None = None
    vae: Path | None = None
    preview: Path | None = None
    control: tuple[Control, ...] = ()
    t2i_adapter: Adapter | None = None
    lora: tuple[Lora, ...] = ()
    embedding: tuple[Embedding, ...] = ()
    size: tuple[int, int] | None = None
    injects: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, without the null class; empty where there are none."""
        return self.conditioning.labels

    @property
    def is_built_in(self) -> bool:
        """Whether the model is one of the zoo."""
        return self.path == built_in(self.name)

    @property
    def has_weights(self) -> bool:
        """False for a geometry, whose parameters are on the meta device."""
        return not any(parameter.is_meta for parameter in self.unet.parameters())

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the UNet's input."""
        size = self.unet.config.sample_size if self.size is None else self.size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def step_tensors(self) -> dict[str, TensorSpec]:
        """What a step is handed besides the sample and the timestep: the conditioning, and what steers the UNet."""
        size = self.sample_shape[1:]
        found = {} if self.t2i_adapter is None else self.t2i_adapter.tensors(*size)
        for i, control in enumerate(self.control):
            found |= control.tensors(*size, i)
        return self.conditioning.tensors | found | (ROW_TENSORS if self.injects else {})

    @property
    def out_channels(self) -> int:
        """Channels of the UNet's output: fewer than the input's where an image or a mask is concatenated to it."""
        return int(self.unet.config.out_channels)

    @property
    def concat(self) -> tuple[Concatenated, ...]:
        """What its UNet takes beside the latent, as a bundle says it; empty where nothing tells.

        diffusers' pipelines say it by their classes; of a single file, or a UNet alone, the number of channels does.
        """
        latent = self.out_channels
        known: dict[int, tuple[tuple[Concatenated, ...], str]] = {
            1 + latent: (("mask", "masked_image"), "Inpaint"),
            latent: (("image",), "InstructPix2Pix"),
            1: (("depth",), "Depth2Img"),
        }
        found, kind = known.get(self.sample_shape[0] - latent, ((), ""))
        index = self.home / "model_index.json"
        named = str(read_json(index).get("_class_name", "")) if self.single is None and index.exists() else ""
        is_whole = named.startswith("StableDiffusion")
        return found if self.conditioning.kind == "text" and (kind in named or not is_whole) else ()

    @property
    def is_distilled(self) -> bool:
        """Whether the model was distilled to a few steps, by its scheduler or by a guidance that the UNet is told."""
        few = self.scheduler is not None and is_for_few_steps(self.scheduler)
        return few or GUIDANCE in self.conditioning.tensors

    @property
    def usual_sampler(self) -> str:
        """The sampler that the model is sampled with by default: its own; of a built-in geometry, dpmpp_2m.

        Raises:
            UnsupportedError: The model's own cannot be followed.
        """
        assert self.scheduler is not None
        # Random weights make no trained model of a geometry.
        was_trained = not self.is_built_in or any((self.path / "unet").glob("*.safetensors"))
        return own_sampler(self.scheduler) if was_trained else USUAL

    @property
    def usual_steps(self) -> int:
        """The steps that the model is sampled in by default: its card's, where that says so."""
        if self.card.steps is not None:
            return self.card.steps
        return 4 if self.is_distilled else 8

    @property
    def usual_guidance(self) -> float:
        """The guidance that the model is sampled with by default; 1 is off.

        Its card's, where that says so; else with a null class 2.0; with text 7.5, 8.5 where the UNet is told
        (diffusers' default for LCM), and off where it was distilled without.
        """
        known = self.conditioning
        if self.card.guidance_scale is not None and (known.kind == "text" or known.null_label is not None):
            return self.card.guidance_scale
        if GUIDANCE in known.tensors:
            return 8.5
        if known.kind == "class":
            return 1.0 if known.null_label is None else 2.0
        return 7.5 if known.kind == "text" and not self.is_distilled else 1.0

    def check_schedule(self) -> None:
        """Refuses a model that cannot be sampled or trained.

        Raises:
            ModelError: The directory has no scheduler.
            UnsupportedError: The UNet predicts a variance too.
        """
        if self.scheduler is None:
            raise ModelError(f"{self.path} has no scheduler/scheduler_config.json; a wrong schedule would give noise")
        if self.out_channels > self.sample_shape[0]:
            raise UnsupportedError(
                f"{self.name}: the UNet takes {self.sample_shape[0]} channels and gives {self.out_channels}, a learned "
                "variance beside the prediction; expected a UNet without learned variance"
            )


def load_model(
    source: str | Path,
    *,
    lora: Sequence[str] = (),
    embedding: Sequence[str] = (),
    vae: str | Path | None = None,
    preview: str | Path | None = None,
    control: str | Path | Sequence[str | Path] = (),
    t2i_adapter: str | Path | None = None,
    configs: str | Path | None = None,
    prediction_type: str | None = None,
    allow_pickle: bool = False,
) -> Model:
    """Loads a model from a diffusers directory (a UNet's, or a pipeline's), a single file, or by its built-in name.

    A path that exists comes before a name.

    Args:
        lora: ``FILE[:scale]`` of each LoRA that is fused, in order.
        embedding: ``FILE[:token]`` of each textual inversion, whose token prompts may name.
        vae: A directory or a file with the autoencoder that replaces the pipeline's.
        preview: A directory, or a file with config.json beside it, with an AutoencoderTiny of the same latents (TAESD).
        control: A directory with a ControlNet of the same base, or several, whose residuals are added up.
        t2i_adapter: A directory with a T2I-Adapter of the same base; not beside a ControlNet.
        configs: For a single file of another geometry: a pipeline's directory whose configurations fit.
        prediction_type: For a single file: ``epsilon``, ``v_prediction`` or ``sample``; None infers it.
        allow_pickle: Read a ``.ckpt``, and an embedding's ``.pt`` or ``.bin``, too: tensors only.

    Raises:
        ModelError: The model is missing, empty, or its files cannot be read.
        ConfigError: An option does not fit the model.
        UnsupportedError: The model is of a class that edgediff does not handle.
    """
    choices = f"a diffusers directory, a single file or one of: {', '.join(ZOO)}"
    if not str(source):
        raise ModelError(f"the model has no name; expected {choices}")
    path = Path(source)
    if path.is_file():
        model = _load_single(open_single_file(path, configs, allow_pickle, prediction_type))
    elif prediction_type is not None or configs is not None:
        raise ConfigError(
            f"a prediction type or configurations were given, but {source} is no single file; leave them out: a "
            "directory has its own"
        )
    elif path.is_dir():
        model = _load(path, name=repository_name(path), weights_required=True)
    else:
        model = load_built_in(str(source))
    if vae is not None:
        _check_autoencoder(model, Path(vae), "replace", allow_pickle)
        model = replace(model, vae=Path(vae))
    if preview is not None:
        _check_autoencoder(model, Path(preview), "go beside", allow_pickle)
        model = replace(model, preview=Path(preview))
    nets = [control] if isinstance(control, str | Path) else control
    model = replace(model, control=tuple(load_control(Path(net), model.unet) for net in nets))
    if t2i_adapter is not None:
        if nets:
            raise ConfigError(
                f"a ControlNet, {nets[0]}, and a T2I-Adapter, {t2i_adapter}, were given; give one of them"
            )
        model = replace(model, t2i_adapter=find_t2i_adapter(Path(t2i_adapter), model.unet))
    if embedding:
        model = _with_embedding(model, embedding, allow_pickle)
    return _with_lora(model, lora) if lora else model


def load_built_in(name: str) -> Model:
    """Loads a model of the zoo, whatever the working directory contains under its name; a ModelError if none has it."""
    folder = built_in(name)
    if folder is None:
        raise no_model(name)
    return _load(folder, name=name, weights_required=False)


def random_weights(model: Model, seed: int) -> Model:
    """Gives a geometry random weights, torch's default initialisation under a seed.

    The new hash names the seed, so that the result is never taken for a trained model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = type(model.unet)(**plain_config(model.unet)).eval().requires_grad_(False)
    digest = hashlib.sha256(f"{model.sha256} random weights {seed}".encode()).hexdigest()
    return replace(model, unet=unet, sha256=digest)


def repository_name(path: Path) -> str:
    """A directory's name, or its repository's in the Hugging Face cache (models--ORG--NAME/snapshots/COMMIT)."""
    *_, repository, folder, name = ("", "", *path.resolve().parts)
    if folder == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return name


def unet_config(model: Model) -> dict[str, Any]:
    """The UNet's configuration as diffusers saves it, without where it was loaded from."""
    config = json.loads(model.unet.to_json_string())
    if model.size is not None:
        height, width = model.size
        config["sample_size"] = height if height == width else [height, width]
    return {key: value for key, value in config.items() if key != "_name_or_path"}


# From a directory to a model


def _load(path: Path, name: str, weights_required: bool) -> Model:
    pipeline = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    check_pipeline(path, pipeline)
    folder = path / "unet" if (path / "unet").is_dir() else path
    # A UNet's folder within a pipeline's: its scheduler and the rest are in the folder around it.
    home = path.parent if folder == path and (path.parent / "scheduler").is_dir() else path
    check_folder(folder)
    config = read_json(folder / "config.json")
    check_config(folder / "config.json", config)
    files = weight_files(folder)
    if weights_required:
        check_weights(folder, files)
    pipeline = read_json(home / "model_index.json") if (home / "model_index.json").exists() else {}
    unet = _build(config, folder / "config.json")
    conditioning = _conditioning(home, unet, folder / "config.json")
    if files:
        fill(unet, {key: tensor.float() for key, tensor in read_state(folder).items()}, folder, "config.json")
    schedule = next((home / file for file in SCHEDULER_FILES if (home / file).exists()), None)
    return Model(
        name=repository_name(home) if home != path else name,
        unet=unet.eval().requires_grad_(False),
        scheduler=None if schedule is None else _scheduler(schedule, read_json(schedule)),
        conditioning=conditioning,
        space="latent" if _is_latent(pipeline, unet.config.out_channels) else "pixel",
        card=read_card(home),
        sha256=_digest([folder / "config.json", *files], schedule),
        path=path,
        home=home,
    )


def _load_single(single: SingleFile) -> Model:
    config, schedule = single.unet_config(), single.scheduler_config()
    file = single.geometry / "unet" / "config.json"
    check_config(file, config)
    unet = _build(config, file)
    conditioning = _conditioning(single.home, unet, file)
    state = single.state("unet", config)
    fill(unet, {key: tensor.float() for key, tensor in state.items()}, single.path, "kind's configuration")
    settings = json.dumps([config, schedule], sort_keys=True)
    return Model(
        name=single.path.stem,
        unet=unet.eval().requires_grad_(False),
        scheduler=_scheduler(single.geometry / "scheduler" / "scheduler_config.json", schedule),
        conditioning=conditioning,
        space="latent",
        card=Card("unknown", None, ""),
        sha256=hashlib.sha256(settings.encode() + single.sha256).hexdigest(),
        path=single.path,
        home=single.home,
        single=single,
    )


def _check_autoencoder(model: Model, path: Path, does: str, allow_pickle: bool) -> None:
    """Refuses an autoencoder that is not there, and a model without one of its own."""
    index = model.home / "model_index.json"
    if not index.exists() or read_json(index).get("vae") in (None, [None, None]):
        raise ConfigError(f"{path} would {does} an autoencoder, and {model.name} has none; name a whole pipeline")
    if path.is_file():
        check_file(path, allow_pickle)
    elif not path.is_dir():
        raise ConfigError(f"no autoencoder at {path}; name a directory with config.json and weights, or a file")


def _with_lora(model: Model, specs: Sequence[str]) -> Model:
    """Fuses each LoRA into the UNet, and checks those for the text encoders: those are fused when they are loaded."""
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights; name a model with weights for a LoRA")
    digest = model.sha256
    found = []
    for spec in specs:
        lora = Lora(*read_spec(spec), model.unet.config)
        for component, layers in lora.layers().items():
            if component == UNET:
                lora.check(component, model.unet, layers)
                continue
            file = model.home / component / "config.json"
            if component not in TEXT or not file.exists():
                raise ModelError(
                    f"{lora.path} has weights for {component}, which {model.name} does not have; take one of its own"
                )
            lora.check(component, empty_text_encoder(read_json(file)), layers)
        lora.fuse(UNET, model.unet)
        found.append(lora)
        digest = hashlib.sha256(f"{digest} lora {lora.sha256}".encode()).hexdigest()
    return replace(model, sha256=digest, lora=tuple(found))


def _with_embedding(model: Model, specs: Sequence[str], allow_pickle: bool) -> Model:
    """Reads each textual inversion, and checks it against the model's text encoders and their tokenizers.

    The model's hash stays what it is: the UNet's.
    """
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights; name a model with weights for an embedding")
    files = {name: model.home / name / "config.json" for name in TEXT if model.conditioning.kind == "text"}
    encoders = {name: read_json(file) for name, file in files.items() if file.exists()}
    if not encoders:
        raise ConfigError(f"embedding {specs[0]!r}: {model.name} has no text encoder; name a whole pipeline with one")
    found = tuple(read_embedding(spec, model.name, encoders, allow_pickle) for spec in specs)
    for name, config in encoders.items():
        check_tokens(found, load_tokenizer(tokenizer_folder(model.home, name)), rows_of(config))
    return replace(model, embedding=found)


def _build(config: dict[str, Any], file: Path) -> Any:
    """The UNet of a configuration, on the meta device."""
    kind: Any = UNETS[config["_class_name"]]
    try:
        with torch.device("meta"):
            unet = kind.from_config(config)
    except (EdgediffError, *BAD_SETTINGS) as e:
        raise ModelError(f"{file} does not describe a {kind.__name__}: {one_line(e)}") from e
    check_sample_size(file, unet.config.sample_size)
    return unet


def _conditioning(home: Path, unet: Any, file: Path) -> Conditioning:
    """What the UNet is conditioned on, tried in a step on the meta device: diffusers builds UNets that cannot run."""
    try:
        StepEmbedding(unet)  # refuses by name what it does not embed
        known = read_conditioning(home, unet.config)
        side = 2 ** len(unet.config.block_out_channels)
        with torch.device("meta"), torch.no_grad():
            cond = {name: spec.empty(rows=2) for name, spec in known.tensors.items()}
            predict(unet, torch.empty(2, unet.config.in_channels, side, side), torch.empty(1), cond)
    except BAD_SETTINGS as e:
        raise UnsupportedError(f"{file} describes a UNet that cannot run: {one_line(e)}") from e
    return known


def _scheduler(file: Path, config: dict[str, Any]) -> SchedulerMixin:
    kind = scheduler_class(config)
    if kind is None:
        raise ModelError(f"{file} is of class {config.get('_class_name')!r}; expected a scheduler of diffusers")
    check_counts(file, config)
    try:
        scheduler: SchedulerMixin = kind.from_config(config)
        return scheduler
    except BAD_SETTINGS as e:
        raise ModelError(f"{file} does not describe a {kind.__name__}: {one_line(e)}") from e


def _digest(files: list[Path], schedule: Path | None) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file_sha256(file))
    if schedule is not None:
        digest.update(schedule.read_bytes())
    return digest.hexdigest()


def _is_latent(pipeline: dict[str, Any], channels: int) -> bool:
    # A component that a pipeline does without is listed as [null, null].
    decoders = (pipeline.get(name) not in (None, [None, None]) for name in ("vae", "vqvae"))
    return any(decoders) or channels not in (1, 3)


# What is refused


def check_pipeline(path: Path, pipeline: dict[str, Any]) -> None:
    """Refuses a pipeline of another class, by name."""
    name = pipeline.get("_class_name")
    if name is not None and name not in PIPELINES:
        raise UnsupportedError(f"{path} is a pipeline of class {name!r}; supported: {', '.join(PIPELINES)}")


def check_folder(folder: Path) -> None:
    """Refuses a folder that is not a UNet's, and says what it contains instead."""
    if not any(folder.iterdir()):
        raise ModelError(f"{folder} is empty; expected config.json and weights of a diffusers UNet")
    if (folder / "config.json").exists():
        return
    if (folder / "transformer").is_dir():
        raise UnsupportedError(f"{folder} is a pipeline with a transformer instead of a UNet; supported: UNets")
    if (folder / "snapshots").is_dir():
        raise ModelError(
            f"{folder} is a repository of the Hugging Face cache; name one of its snapshots: {folder}/snapshots/COMMIT"
        )
    if (folder / "model_index.json").exists():
        raise ModelError(f"{folder} is a pipeline without a folder unet/; expected one with config.json and weights")


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Refuses a configuration of another class, or with counts that would take hours."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in UNETS:
        raise UnsupportedError(f"{file} is of class {name!r}; supported: {', '.join(UNETS)}")
    check_counts(file, config)


def check_counts(file: Path, config: dict[str, Any]) -> None:
    """Refuses settings above `COUNTS`."""
    for name, most in COUNTS.items():
        counts = config.get(name)
        for count in counts if isinstance(counts, list) else [counts]:
            if isinstance(count, int | float) and count > most:
                raise ModelError(f"{file} has {name} {count}; expected {most} at most")


def check_sample_size(file: Path, size: Any) -> None:
    """Refuses a sample size that is neither a side nor a height and a width."""
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MAX_SIDE for side in sides):
        raise ModelError(f"{file} has sample_size {size!r}; expected a size, or height and width")
