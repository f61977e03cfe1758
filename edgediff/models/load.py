"""A trained model from disk: a UNet with what it needs to be sampled.

Weights are read from safetensors first, from ``.bin`` only with ``weights_only=True``, and from no other pickle. The
network is built and tried on the meta device and takes the loaded tensors as they are: loading costs the weights once.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from edgediff.errors import EdgediffError, ModelError, UnsupportedError
from edgediff.models.card import Card, read_card
from edgediff.models.conditioning import Conditioning, read_conditioning
from edgediff.models.embedding import StepEmbedding
from edgediff.models.spectral import SPECTRAL
from edgediff.models.undivided import predict
from edgediff.zoo import ZOO, built_in

UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel, **SPECTRAL}
WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("", ".fp16", ".bf16")
SCHEDULER_FILES = ("scheduler/scheduler_config.json", "scheduler_config.json")
# How torch and diffusers fail over settings of the wrong kind.
BAD_SETTINGS = (
    TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, LookupError, NameError, AssertionError,
    ImportError, MemoryError,
)  # fmt: skip
# Settings that say how often something is built or listed: a huge one would take hours, or all memory.
COUNTS = {
    "layers_per_block": 100,
    "transformer_layers_per_block": 100,
    "reverse_transformer_layers_per_block": 100,
    "num_class_embeds": 2**20,
    "num_train_timesteps": 2**20,
}
MAX_SIDE = 2**16
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Model:
    """A trained diffusion UNet, ready to be split, exported and sampled.

    Attributes:
        name: Built-in name, the repository's in the Hugging Face cache, or the directory's.
        unet: The network in evaluation mode, float32; on the meta device where a geometry has no weights.
        scheduler: diffusers' scheduler as the model was saved with it; None where the directory has none: such a model
            can be counted, not sampled.
        conditioning: What the UNet is conditioned on.
        space: ``pixel`` where the UNet works on images, ``latent`` where a decoder comes after it.
        card: Licence and description of the source.
        sha256: Hash over configuration and weights; a bundle is compared with it.
        path: The directory that it came from.
        home: Where schedule, autoencoder and card lie: ``path``, or the directory around it.
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

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, without the null class; empty where there are none."""
        return self.conditioning.labels

    @property
    def is_built_in(self) -> bool:
        """Whether the model lies in the zoo."""
        return self.path == built_in(self.name)

    @property
    def has_weights(self) -> bool:
        """False for a geometry, whose parameters lie on the meta device."""
        return not any(parameter.is_meta for parameter in self.unet.parameters())

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the UNet takes."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def out_channels(self) -> int:
        """Channels of what the UNet gives: fewer than it takes where an image or a mask comes beside the sample."""
        return int(self.unet.config.out_channels)

    def check_schedule(self) -> None:
        """Refuses to sample or train what cannot be.

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


def load_model(source: str | Path) -> Model:
    """Loads a model from a diffusers directory (a UNet's, or a whole pipeline's) or by its built-in name.

    Args:
        source: A path, or one of the names of the zoo. A path that exists comes before a name.

    Raises:
        ModelError: The directory is missing, empty, or its files cannot be read.
        UnsupportedError: The model is of a class that edgediff does not handle.
    """
    choices = f"a diffusers directory or one of: {', '.join(ZOO)}"
    if not str(source):
        raise ModelError(f"the model has no name; expected {choices}")
    path = Path(source)
    if path.is_dir():
        return _load(path, name=repository_name(path), weights_required=True)
    if path.exists():
        raise ModelError(
            f"{source} is a file; expected {choices}. A single-file checkpoint is converted by diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIRECTORY)"
        )
    return load_built_in(str(source))


def load_built_in(name: str) -> Model:
    """Loads a model of the zoo, whatever lies in the working directory under its name.

    Raises:
        ModelError: There is none of this name.
    """
    folder = built_in(name)
    if folder is None:
        raise ModelError(f"no model at {name}: no such directory, and no built-in name (choices: {', '.join(ZOO)})")
    return _load(folder, name=name, weights_required=False)


def random_weights(model: Model, seed: int) -> Model:
    """Gives a geometry random weights, torch's default initialisation under a seed.

    The new hash names the seed, so that the result is never taken for a trained model.
    """
    config = {key: value for key, value in model.unet.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = type(model.unet)(**config).eval().requires_grad_(False)
    digest = hashlib.sha256(f"{model.sha256} random weights {seed}".encode()).hexdigest()
    return replace(model, unet=unet, sha256=digest)


def repository_name(path: Path) -> str:
    """A directory's name, or its repository's in the Hugging Face cache (models--ORG--NAME/snapshots/COMMIT)."""
    *_, repository, folder, name = ("", "", *path.resolve().parts)
    if folder == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return name


def _load(path: Path, name: str, weights_required: bool) -> Model:
    unet_path = path / "unet" if (path / "unet").is_dir() else path
    config = _unet_config(unet_path)
    unet_class = UNETS.get(str(config.get("_class_name")))
    if unet_class is None:
        raise UnsupportedError(
            f"{unet_path}/config.json is of class {config.get('_class_name')!r}; supported: {', '.join(UNETS)}"
        )
    _check_counts(unet_path / "config.json", config)
    files = _weight_files(unet_path)
    if not files and weights_required:
        others = sorted(file.name for file in unet_path.glob(f"{WEIGHTS}.*") if file.is_file())
        found = f" of a known name (found: {', '.join(others)})" if others else ""
        raise ModelError(f"{unet_path} has a config.json but no weights{found}; expected {WEIGHTS}.safetensors")
    # A UNet's folder within a pipeline's: what the UNet is sampled with lies beside it.
    home = path.parent if unet_path == path and (path.parent / "scheduler").is_dir() else path
    unet = _build(unet_class, config, unet_path)
    conditioning = _conditioning(home, unet, unet_path)
    digest = hashlib.sha256()
    for file in (unet_path / "config.json", *files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if files:
        _fill(unet, files, unet_path)
    pipeline = read_json(home / "model_index.json") if (home / "model_index.json").exists() else {}
    scheduler_path = next((home / name for name in SCHEDULER_FILES if (home / name).exists()), None)
    if scheduler_path is not None:
        digest.update(scheduler_path.read_bytes())
    return Model(
        name=repository_name(home) if home != path else name,
        unet=unet.eval().requires_grad_(False),
        scheduler=None if scheduler_path is None else _scheduler(scheduler_path),
        conditioning=conditioning,
        space="latent" if _is_latent(pipeline, unet.config.out_channels) else "pixel",
        card=read_card(home),
        sha256=digest.hexdigest(),
        path=path,
        home=home,
    )


def _check_counts(file: Path, config: dict[str, Any]) -> None:
    for name, most in COUNTS.items():
        counts = config.get(name)
        for count in counts if isinstance(counts, list) else [counts]:
            if isinstance(count, int | float) and count > most:
                raise ModelError(f"{file} has {name} {count}; expected {most} at most")


def _unet_config(path: Path) -> dict[str, Any]:
    """The UNet's configuration; where there is none, says what lies there instead."""
    if not any(path.iterdir()):
        raise ModelError(f"{path} is empty; expected config.json and weights of a diffusers UNet")
    if not (path / "config.json").exists():
        if (path / "transformer").is_dir():
            raise UnsupportedError(f"{path} is a pipeline with a transformer instead of a UNet; supported: UNets")
        if (path / "snapshots").is_dir():
            raise ModelError(
                f"{path} is a repository of the Hugging Face cache; name one of its snapshots: {path}/snapshots/COMMIT"
            )
        if (path / "model_index.json").exists():
            raise ModelError(f"{path} is a pipeline without a folder unet/; expected one with config.json and weights")
    return read_json(path / "config.json")


def _build(unet_class: Any, config: dict[str, Any], path: Path) -> Any:
    """The UNet of a configuration, on the meta device."""
    try:
        with torch.device("meta"):
            unet = unet_class.from_config(config)
    except (EdgediffError, *BAD_SETTINGS) as e:
        raise ModelError(f"{path}/config.json does not describe a {unet_class.__name__}: {one_line(e)}") from e
    size = unet.config.sample_size
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MAX_SIDE for side in sides):
        raise ModelError(f"{path}/config.json has sample_size {size!r}; expected a size, or height and width")
    return unet


def _conditioning(home: Path, unet: Any, path: Path) -> Conditioning:
    """What the UNet is conditioned on, tried in a step without numbers: diffusers builds UNets that cannot run."""
    try:
        StepEmbedding(unet)  # refuses by name what it does not embed
        known = read_conditioning(home, unet.config)
        side = 2 ** len(unet.config.block_out_channels)
        with torch.device("meta"), torch.no_grad():
            cond = {name: torch.empty(2, *spec.shape, dtype=spec.dtype) for name, spec in known.tensors.items()}
            predict(unet, torch.empty(2, unet.config.in_channels, side, side), torch.empty(1), cond)
    except BAD_SETTINGS as e:
        raise UnsupportedError(f"{path}/config.json describes a UNet that cannot run: {one_line(e)[:300]}") from e
    return known


def _scheduler(path: Path) -> SchedulerMixin:
    config = read_json(path)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ModelError(f"{path} is of class {config.get('_class_name')!r}; expected a scheduler of diffusers")
    _check_counts(path, config)
    try:
        return kind.from_config(config)
    except BAD_SETTINGS as e:
        raise ModelError(f"{path} does not describe a {kind.__name__}: {one_line(e)}") from e


def _is_latent(pipeline: dict[str, Any], channels: int) -> bool:
    # A component that a pipeline does without is listed as [null, null].
    decoders = (pipeline.get(name) not in (None, [None, None]) for name in ("vae", "vqvae"))
    return any(decoders) or channels not in (1, 3)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: one or an index's shards, safetensors before .bin, fp32 before fp16."""
    for suffix in ("safetensors", "bin"):
        for variant in VARIANTS:
            single = path / f"{WEIGHTS}{variant}.{suffix}"
            index = path / f"{WEIGHTS}.{suffix}.index{variant}.json"
            if single.exists():
                return [single]
            if index.exists():
                named = read_json(index).get("weight_map")
                shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
                bad = [shard for shard in shards if Path(shard).name != shard or not (path / shard).is_file()]
                if bad or not shards:
                    raise ModelError(f"{index} names shards that are missing: {', '.join(bad) or 'none'}")
                return [path / shard for shard in shards]
    return []


def _fill(unet: UNet2DModel | UNet2DConditionModel, files: list[Path], path: Path) -> None:
    """Puts the tensors of the files in the place of the meta parameters, as float32."""
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update({_modern(key): tensor.float() for key, tensor in _tensors(file).items()})
    try:
        unet.load_state_dict(state, assign=True)
    except RuntimeError as e:
        reason = _known_misfit({*state}, {*unet.state_dict()}) or one_line(e)[:300]
        raise ModelError(f"the weights in {path} do not fit its config.json: {reason}") from e
    not_finite = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise ModelError(f"{path}: weights are not finite in {', '.join(not_finite[:3])}")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(f"{file} is a Git LFS pointer and holds no weights; run `git lfs pull` in its repository")
    try:
        tensors = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, AttributeError) as e:
        raise ModelError(f"{file} cannot be read as weights, it is damaged or truncated: {one_line(e)}") from e
    except Exception as e:  # pickle's own errors share no base class
        # torch's own message goes on to say how to run the file's code.
        raise ModelError(f"{file} is not a plain file of tensors and was not opened; expected safetensors") from e
    named = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ModelError(f"{file} does not contain tensors by name")
    return tensors


def _known_misfit(given: set[str], wanted: set[str]) -> str | None:
    """Why names do not fit, where the names themselves say so."""
    if any(".base_layer." in name or ".lora_" in name for name in given):
        return "they hold LoRA layers of PEFT; fuse them (merge_and_unload() or fuse_lora()) and save the UNet again"
    prefix = next(iter(given), "").partition(".")[0] + "."
    if {name.removeprefix(prefix) for name in given if name.startswith(prefix)} == wanted:
        return f"every name begins with {prefix!r}, as a module around the UNet saves them; save the UNet inside of it"
    return None


def _modern(key: str) -> str:
    """Renames the attention layers of checkpoints from before diffusers 0.12."""
    parts = key.split(".")
    if "attentions" in parts and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model.

    Raises:
        ModelError: It is missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ModelError(f"{path} is missing; expected a directory saved by diffusers") from e
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ModelError(f"{path} cannot be read as JSON: {one_line(e)}") from e
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}; expected an object of settings by name")
    return data


def one_line(e: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(e).split()) or type(e).__name__


def unet_config(model: Model) -> dict[str, Any]:
    """The UNet's configuration as diffusers saves it, without where it was loaded from."""
    config = json.loads(model.unet.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}
