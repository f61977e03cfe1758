"""A trained model from disk: a UNet with what it needs to be sampled.

Weights are read from safetensors first, from ``.bin`` only with ``weights_only=True``, and from no other pickle. The
network is built on the meta device and takes the loaded tensors as they are, so that loading costs the weights once.
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
from edgediff.models.spectral import SPECTRAL
from edgediff.zoo import ZOO, built_in

UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel, **SPECTRAL}
WEIGHTS = "diffusion_pytorch_model"
SCHEDULER_FILES = ("scheduler/scheduler_config.json", "scheduler_config.json")
# How torch and diffusers fail over settings of the wrong kind.
BAD_SETTINGS = (TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, LookupError, NameError)
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Model:
    """A trained diffusion UNet, ready to be split, exported and sampled.

    Attributes:
        name: Built-in name, or the directory's name.
        unet: The network in evaluation mode, float32; on the meta device where a geometry has no weights.
        scheduler: diffusers' scheduler, set as the model was saved with it; None where the directory has none, which is
            enough to count the model and too little to sample it.
        conditioning: What the UNet is conditioned on, with labels where there are any.
        space: ``pixel`` where the UNet works on images, ``latent`` where a decoder comes after it.
        card: Licence and description of the source.
        sha256: Hash over configuration and weights; what a bundle is compared with.
        path: The directory that it came from.
        home: The directory of the whole: where schedule, autoencoder and card lie. ``path``, or the one around it.
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
        """False for a geometry card, whose parameters lie on the meta device."""
        return not any(parameter.is_meta for parameter in self.unet.parameters())

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one sample."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def check_schedule(self) -> None:
        """Refuses to sample or train by a schedule that is not known.

        Raises:
            ModelError: The directory has no scheduler.
        """
        if self.scheduler is None:
            raise ModelError(f"{self.path} has no scheduler/scheduler_config.json; a wrong schedule would give noise")


def load_model(source: str | Path) -> Model:
    """Loads a model from a diffusers directory (a UNet's, or a whole pipeline's) or by its built-in name.

    Args:
        source: A path, or one of the names of the zoo. A path that exists comes before a name.

    Returns:
        The model. Built-in geometries without weights have their parameters on the meta device.

    Raises:
        ModelError: The directory is missing, empty, or its files cannot be read.
        UnsupportedError: The model is of a class that edgediff does not handle.
    """
    if not str(source):
        raise ModelError(f"the model has no name; expected a diffusers directory or one of: {', '.join(ZOO)}")
    path = Path(source)
    if not path.is_dir():
        if path.exists():
            raise ModelError(f"{source} is a file; expected a diffusers directory or one of: {', '.join(ZOO)}")
        return load_built_in(str(source))
    return _load(path, name=path.resolve().name, weights_required=True)


def load_built_in(name: str) -> Model:
    """Loads a model of the zoo, whatever lies in the working directory under its name.

    Args:
        name: One of the zoo's.

    Returns:
        The model; of a geometry without weights, with parameters on the meta device.

    Raises:
        ModelError: There is none of this name.
    """
    folder = built_in(name)
    if folder is None:
        raise ModelError(f"no model at {name}: no such directory, and no built-in name (choices: {', '.join(ZOO)})")
    return _load(folder, name=name, weights_required=False)


def random_weights(model: Model, seed: int) -> Model:
    """Gives a geometry random weights, torch's default initialisation under a seed.

    Args:
        model: Usually one without weights.
        seed: Seed of the initialisation.

    Returns:
        A model with the same geometry; its hash names the seed, so that it is never taken for a trained one.
    """
    config = {key: value for key, value in model.unet.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = type(model.unet)(**config).eval().requires_grad_(False)
    digest = hashlib.sha256(f"{model.sha256} random weights {seed}".encode()).hexdigest()
    return replace(model, unet=unet, sha256=digest)


def _load(path: Path, name: str, weights_required: bool) -> Model:
    unet_path = path / "unet" if (path / "unet").is_dir() else path
    if not any(unet_path.iterdir()):
        raise ModelError(f"{unet_path} is empty; expected config.json and weights of a diffusers UNet")
    config = read_json(unet_path / "config.json")
    unet_class = UNETS.get(str(config.get("_class_name")))
    if unet_class is None:
        raise UnsupportedError(
            f"{unet_path}/config.json is of class {config.get('_class_name')!r}; supported: {', '.join(UNETS)}"
        )
    files = _weight_files(unet_path)
    if not files and weights_required:
        raise ModelError(f"{unet_path} has a config.json but no weights; expected {WEIGHTS}.safetensors")
    try:
        with torch.device("meta"):
            unet = unet_class.from_config(config)
    except (EdgediffError, *BAD_SETTINGS) as e:
        raise ModelError(f"{unet_path}/config.json does not describe a {unet_class.__name__}: {one_line(e)}") from e
    size = unet.config.sample_size
    if not all(isinstance(n, int) and n > 0 for n in (size if isinstance(size, list | tuple) else (size,))):
        raise ModelError(f"{unet_path}/config.json has sample_size {size!r}; expected a size, or height and width")
    digest = hashlib.sha256()
    for file in (unet_path / "config.json", *files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if files:
        _fill(unet, files, unet_path)
    # A UNet's folder within a pipeline's: what the UNet is sampled with lies beside it.
    home = path.parent if unet_path == path and (path.parent / "scheduler").is_dir() else path
    pipeline = read_json(home / "model_index.json") if (home / "model_index.json").exists() else {}
    scheduler_path = next((home / name for name in SCHEDULER_FILES if (home / name).exists()), None)
    if scheduler_path is not None:
        digest.update(scheduler_path.read_bytes())
    return Model(
        name=home.resolve().name if home != path else name,
        unet=unet.eval().requires_grad_(False),
        scheduler=None if scheduler_path is None else _scheduler(scheduler_path),
        conditioning=read_conditioning(home, unet.config),
        space="latent" if _is_latent(pipeline, unet.config.in_channels) else "pixel",
        card=read_card(home),
        sha256=digest.hexdigest(),
        path=path,
        home=home,
    )


def _scheduler(path: Path) -> SchedulerMixin:
    config = read_json(path)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ModelError(f"{path} is of class {config.get('_class_name')!r}; expected a scheduler of diffusers")
    try:
        return kind.from_config(config)
    except (ImportError, *BAD_SETTINGS) as e:
        raise ModelError(f"{path} does not describe a {kind.__name__}: {one_line(e)}") from e


def _is_latent(pipeline: dict[str, Any], channels: int) -> bool:
    return "vae" in pipeline or "vqvae" in pipeline or channels not in (1, 3)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: one or an index's shards, safetensors before .bin, fp32 before fp16."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            single = path / f"{WEIGHTS}{variant}.{suffix}"
            index = path / f"{WEIGHTS}.{suffix}.index{variant}.json"
            if single.exists():
                return [single]
            if index.exists():
                named = read_json(index).get("weight_map")
                shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
                bad = [shard for shard in shards if Path(shard).name != shard or not (path / shard).is_file()]
                if bad or not shards:
                    raise ModelError(f"{index} names shards that are not there: {', '.join(bad) or 'none'}")
                return [path / shard for shard in shards]
    return []


def _fill(unet: UNet2DModel | UNet2DConditionModel, files: list[Path], path: Path) -> None:
    """Puts the tensors of the files in the place of the meta parameters, as float32."""
    state: dict[str, torch.Tensor] = {}
    for file in files:
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
            raise ModelError(f"{file} holds something else than tensors by name")
        state.update({_modern(key): tensor.float() for key, tensor in tensors.items()})
    try:
        unet.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ModelError(f"the weights in {path} do not fit its config.json: {one_line(e)[:300]}") from e
    not_finite = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise ModelError(f"{path}: weights are not finite in {', '.join(not_finite[:3])}")


def _modern(key: str) -> str:
    """Renames the attention layers of checkpoints from before diffusers 0.12."""
    parts = key.split(".")
    if "attentions" in parts and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model.

    Args:
        path: The file.

    Returns:
        What it holds, by name.

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
    """Puts an exception's message on one line."""
    return " ".join(str(e).split()) or type(e).__name__


def unet_config(model: Model) -> dict[str, Any]:
    """The UNet's configuration as diffusers saves it, without where it was loaded from."""
    config = json.loads(model.unet.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}
