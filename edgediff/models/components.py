"""The components around the UNet in a diffusers pipeline: text encoders with their tokenizers, and the autoencoder.

What they are follows from their configurations; their weights are loaded one component at a time, when it is exported
or run, so that a large pipeline is never in memory as a whole.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.clip_tokenizer import load_tokenizer, tokenizer_folder, write_tokenizer
from edgediff.models.component_loading import autoencoder, empty_autoencoder, empty_text_encoder, text_encoder
from edgediff.models.load import Model
from edgediff.models.lora import Lora
from edgediff.models.model_files import (
    DIFFUSERS,
    TRANSFORMERS,
    check_weights,
    file_sha256,
    read_json,
    read_state,
    weight_files,
)
from edgediff.models.part import Part
from edgediff.models.single_file import CheckpointFile
from edgediff.models.t2i_adapter import Adapter, T2IAdapter, adapter_with_weights, empty_adapter
from edgediff.models.textual_inversion import Embedding, all_tokens, expansions, with_rows, with_tokens
from edgediff.outputs import write_json
from edgediff_runtime.manifest import T2I_ADAPTER, Encoder, Graph, Prompt, Stage, Symbol, Tensor, Vae

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
# The order in which a bundle lists and an export writes them.
NAMES = (*TEXT_ENCODERS, "vae_decoder", "vae_encoder", "preview_decoder", T2I_ADAPTER)
VAE_STAGES: dict[str, Stage] = {"vae_decoder": "decode", "vae_encoder": "image", "preview_decoder": "preview"}
Shape = tuple[int | Symbol, ...]


@dataclass(frozen=True)
class PipelineComponent:
    """A component that a bundle may carry.

    Attributes:
        folder: Where its configuration lies, and its weights where `file` is None.
        config: Its configuration, as it lies there; of a text encoder with embeddings, with their tokens.
        graph: Its inputs and outputs, with a symbolic batch.
        file: The checkpoint that its weights come from, or None.
        lora: What is fused into it when it is loaded.
        embedding: What is added to a text encoder, and to its tokenizer, when they are loaded.
    """

    name: str
    stage: Stage
    folder: Path
    config: dict[str, Any]
    graph: Graph
    file: CheckpointFile | None = None
    lora: tuple[Lora, ...] = ()
    embedding: tuple[Embedding, ...] = ()

    def load(self) -> Part:
        """Its module with weights, float32, in evaluation mode.

        Raises:
            ModelError: The weights are missing, damaged, not finite, or of another model.
        """
        where = self.folder if self.file is None else self.file.path
        if self.name == T2I_ADAPTER:
            return self._part(adapter_with_weights(self.config, where))
        if self.name not in TEXT_ENCODERS:
            return self._part(autoencoder(self.config, self._state("vae"), where))
        state = self._state(self.name)
        if self.embedding:
            state = with_rows(state, self.embedding, self.name, len(self.tokenizer))
        encoder = text_encoder(self.config, state, where)
        for lora in self.lora:
            lora.fuse(self.name, encoder)
        return self._part(encoder)

    def empty(self) -> Part:
        """Its module on the meta device, without weights."""
        if self.name == T2I_ADAPTER:
            return self._part(empty_adapter(self.config, self.folder))
        if self.name in TEXT_ENCODERS:
            return self._part(empty_text_encoder(self.config))
        return self._part(empty_autoencoder(self.config, self.folder))

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer of a text encoder; what it was last asked for stays in it.

        Raises:
            ModelError: It is missing or damaged.
        """
        return load_tokenizer(tokenizer_folder(self.folder.parent, self.name), all_tokens(self.embedding))

    @property
    def kind(self) -> str:
        """Its class in diffusers or transformers."""
        return str(self.config["_class_name"] if "_class_name" in self.config else self.config["architectures"][0])

    def _part(self, module: nn.Module) -> Part:
        outputs = tuple(tensor.name for tensor in self.graph.outputs)
        if self.name == T2I_ADAPTER:
            return T2IAdapter(module, len(outputs))
        if self.name in TEXT_ENCODERS:
            return TextEncoder(module, outputs)
        return VaeEncoder(module, outputs) if self.stage == "image" else VaeDecoder(module)

    @property
    def sha256(self) -> str:
        """Hash over its configuration, its weights and what is fused into them or added to them."""
        digest = hashlib.sha256(file_sha256(self.folder / "config.json"))
        if self.file is not None:
            digest.update(self.file.sha256)
        else:
            for file in weight_files(self.folder, self._stems):
                digest.update(file_sha256(file))
        for lora in self.lora:
            digest.update(lora.sha256.encode())
        for embedding in self.embedding:
            digest.update(embedding.sha256.encode())
        return digest.hexdigest()

    @property
    def _stems(self) -> tuple[str, str]:
        return TRANSFORMERS if self.name in TEXT_ENCODERS else DIFFUSERS

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        return read_state(self.folder, self._stems) if self.file is None else self.file.state(name, self.config)


class TextEncoder(Part):
    """A CLIP text encoder: token ids [B, S] in, its states and the pooled ones out.

    ``clip_skip.N`` is the state N layers before the end under the final normalization, which Stable Diffusion's clip
    skip takes; ``hidden_states.N`` is that after N layers as it is, which SDXL takes.
    """

    def __init__(self, encoder: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__(("input_ids",), outputs)
        self.encoder = encoder

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encodes; ``last_hidden_state`` and each state are [B, S, D], the pooled ones [B, P]."""
        out = self.encoder(input_ids=tensors["input_ids"], output_hidden_states=True)
        states = out.hidden_states
        norm: Any = getattr(self.encoder, "text_model", self.encoder)
        made = {}
        for name in self.outputs:
            kind, _, number = name.partition(".")
            if kind == "hidden_states":
                made[name] = states[int(number)]
            elif kind == "clip_skip":
                made[name] = norm.final_layer_norm(states[-1 - int(number)])
            else:
                made[name] = getattr(out, name)
        return made


class VaeDecoder(Part):
    """An autoencoder's decoder: ``latent_sample`` [B, C, H, W] in, ``sample`` [B, 3, h, w] out."""

    def __init__(self, vae: Any) -> None:
        super().__init__(("latent_sample",), ("sample",))
        self.vae = vae
        if hasattr(vae, "quant_conv"):
            self.vae.encoder = self.vae.quant_conv = None
        else:
            self.vae.encoder, self.vae.decoder = None, TinyDecoder(self.vae.decoder)

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Decodes."""
        return {"sample": self.vae.decode(tensors["latent_sample"], return_dict=False)[0]}


class TinyDecoder(nn.Module):
    """An AutoencoderTiny's decoder with diffusers' factors before and after its layers joined with their convolutions.

    Converters join them too, before they round weights to fp16; what they are compared with has to round the same
    weights.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.layers = decoder.layers
        with torch.no_grad():
            self.layers[0].weight.mul_(3)
            self.layers[-1].weight.mul_(2)
            self.layers[-1].bias.mul_(2).sub_(1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Decodes [B, C, H, W], of which diffusers takes 3 tanh(z / 3): [B, 3, h, w] of about -1 to 1."""
        made: torch.Tensor = self.layers(torch.tanh(z / 3))
        return made


class VaeEncoder(Part):
    """An autoencoder's encoder: ``sample`` [B, 3, h, w] in.

    Out come ``latent_parameters`` [B, 2C, H, W], mean and log-variance; of a tiny one, which has no variance,
    ``latent_sample`` [B, C, H, W].
    """

    def __init__(self, vae: Any, outputs: tuple[str, ...]) -> None:
        super().__init__(("sample",), outputs)
        self.vae = vae
        if hasattr(vae, "quant_conv"):
            self.vae.decoder = self.vae.post_quant_conv = None

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encodes."""
        (name,) = self.outputs
        encoded = self.vae.encode(tensors["sample"], return_dict=False)[0]
        return {name: encoded.parameters if name == "latent_parameters" else encoded}


def pipeline_components(model: Model) -> dict[str, PipelineComponent]:
    """The components around a model's UNet, in the order of `NAMES`; none where it stands alone.

    Raises:
        ModelError: A configuration is missing or damaged.
        UnsupportedError: A component is of a class, or has a setting, that edgediff does not handle.
    """
    index = model.home / "model_index.json"
    # A built-in geometry lists an autoencoder that it has no weights of.
    is_geometry = model.is_built_in and not model.has_weights
    listed = read_json(index) if index.exists() and not is_geometry else {}
    found = {}
    for name in TEXT_ENCODERS:
        folder = model.home / name
        if _is_listed(listed, name) and model.conditioning.kind == "text":
            component = replace(
                _text_component(name, folder, _is_xl(model)),
                file=model.single, lora=model.lora, embedding=model.embedding,
            )  # fmt: skip
            if model.embedding:
                component = replace(component, config=with_tokens(component.config, component.tokenizer))
            found[name] = component
    if _is_listed(listed, "vae"):
        folder, file = _vae_source(model)
        config = _config(folder, AUTOENCODERS)
        for name in ("vae_decoder", "vae_encoder"):
            found[name] = _vae_component(name, model, folder, config, file)
    if model.preview is not None:
        folder, file = _preview_source(model.preview)
        config = _config(folder, ("AutoencoderTiny",))
        found["preview_decoder"] = _vae_component("preview_decoder", model, folder, config, file)
    if model.t2i_adapter is not None:
        found[T2I_ADAPTER] = _adapter_component(model.t2i_adapter, model)
    for component in found.values():
        if component.file is None:
            check_weights(component.folder, weight_files(component.folder, component._stems), component._stems)
    return found


def component_hashes(components: Mapping[str, PipelineComponent]) -> dict[str, str]:
    """The hash of each component; the two halves of an autoencoder have one source, which is read once."""
    made: dict[tuple[Path, CheckpointFile | None], str] = {}
    for component in components.values():
        if (component.folder, component.file) not in made:
            made[component.folder, component.file] = component.sha256
    return {name: made[component.folder, component.file] for name, component in components.items()}


def _vae_source(model: Model) -> tuple[Path, CheckpointFile | None]:
    """Where the autoencoder's configuration lies, and the file of its weights where it does not lie beside them."""
    if model.vae is None:
        return model.home / "vae", model.single
    if model.vae.is_dir():
        return (model.vae / "vae" if (model.vae / "vae").is_dir() else model.vae), None
    own = model.vae.parent
    return (own if (own / "config.json").exists() else model.home / "vae"), CheckpointFile(model.vae)


def _preview_source(preview: Path) -> tuple[Path, CheckpointFile | None]:
    """The same of a preview's autoencoder, whose configuration nothing else has."""
    if preview.is_dir():
        return preview, None
    if not (preview.parent / "config.json").exists():
        raise ModelError(f"{preview} has no config.json beside it; name a directory that diffusers saved")
    return preview.parent, CheckpointFile(preview)


def _is_listed(listed: dict[str, Any], name: str) -> bool:
    # A component that a pipeline does without is listed as [null, null].
    return any(value is not None for value in listed.get(name) or ())


def _is_xl(model: Model) -> bool:
    return bool(model.unet.config.get("addition_embed_type") == "text_time")


def _config(folder: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing; copy the whole pipeline")
    config: dict[str, Any] = read_json(folder / "config.json")
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if kind not in classes:
        raise UnsupportedError(f"{folder}/config.json is of class {kind!r}; supported: {', '.join(classes)}")
    return config


def _text_component(name: str, folder: Path, is_xl: bool) -> PipelineComponent:
    config = _config(folder, ("CLIPTextModel", "CLIPTextModelWithProjection"))
    if config.get("use_attention_mask"):
        raise UnsupportedError(f"{folder}/config.json asks for attention masks of the padding; supported: none")
    layers, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
    tokens = int(config.get("max_position_embeddings", 77))
    states: Shape = ("batch", tokens, width)
    projects = config["architectures"] == ["CLIPTextModelWithProjection"]
    pooled = ("text_embeds", int(config.get("projection_dim", 512))) if projects else ("pooler_output", width)
    outputs: dict[str, Shape] = {"last_hidden_state": states, pooled[0]: ("batch", pooled[1])}
    if projects:  # as optimum orders them
        outputs = {pooled[0]: ("batch", pooled[1]), "last_hidden_state": states}
    if is_xl:
        outputs |= {f"hidden_states.{n}": states for n in range(layers)}
    else:
        outputs |= {f"clip_skip.{n}": states for n in range(1, layers)}
    graph = Graph(
        name,
        name,
        None,
        (Tensor("input_ids", "int64", ("batch", tokens)),),
        tuple(Tensor(output, "float32", shape) for output, shape in outputs.items()),
    )
    return PipelineComponent(name, "prompt", folder, config, graph)


def _vae_component(
    name: str, model: Model, folder: Path, config: dict[str, Any], file: CheckpointFile | None
) -> PipelineComponent:
    _, height, width = model.sample_shape
    channels, each = int(config["latent_channels"]), _downscale(config)
    latent: Shape = ("batch", channels, height, width)
    image: Shape = ("batch", 3, each * height, each * width)
    if channels != model.out_channels:
        raise ModelError(
            f"{folder} has {channels} latent channels, the UNet gives {model.out_channels}; take one that fits"
        )
    stage = VAE_STAGES[name]
    if stage != "image":
        inputs, outputs = Tensor("latent_sample", "float32", latent), Tensor("sample", "float32", image)
    else:
        has_variance = config["_class_name"] == "AutoencoderKL"
        made: Shape = ("batch", 2 * channels, height, width) if has_variance else latent
        inputs = Tensor("sample", "float32", image)
        outputs = Tensor("latent_parameters" if has_variance else "latent_sample", "float32", made)
    graph = Graph(name, name, None, (inputs,), (outputs,))
    return PipelineComponent(name, stage, folder, config, graph, file)


def _adapter_component(adapter: Adapter, model: Model) -> PipelineComponent:
    _, height, width = model.sample_shape
    return PipelineComponent(T2I_ADAPTER, "image", adapter.path, adapter.config, adapter.graph(height, width))


def _downscale(config: dict[str, Any]) -> int:
    """Pixels of a side for one of the latent: each level but the last halves the picture."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    assert blocks is not None
    return int(2 ** (len(blocks) - 1))


def prompt_settings(model: Model, found: Mapping[str, PipelineComponent]) -> Prompt | None:
    """How prompts become the conditioning; None where the pipeline has no text encoder.

    Raises:
        ModelError: A tokenizer is missing or damaged.
    """
    encoders = tuple(_encoder_settings(model, found[name]) for name in TEXT_ENCODERS if name in found)
    if not encoders:
        return None
    listed = read_json(model.home / "model_index.json")
    zeros = bool(listed.get("force_zeros_for_empty_prompt", True)) and _is_xl(model)
    return Prompt(encoders, zeros)


def _encoder_settings(model: Model, component: PipelineComponent) -> Encoder:
    tokenizer = component.tokenizer
    names = [tensor.name for tensor in component.graph.outputs]
    if _is_xl(model):
        hidden = [name for name in reversed(names) if name.startswith("hidden_states.")]
    else:
        hidden = ["last_hidden_state", *(name for name in names if name.startswith("clip_skip."))]
    _, tokens = component.graph.inputs[0].shape
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if any(each is None for each in ids):
        where = tokenizer_folder(model.home, component.name)
        raise ModelError(f"{where} names no token for beginning, end or padding")
    length = min(int(tokenizer.model_max_length), int(tokens))
    if length != tokens:
        raise UnsupportedError(
            f"{component.folder} has {tokens} positions and its tokenizer pads to {length}; supported: the same number"
        )
    pooled = "text_embeds" if "text_embeds" in names and _is_xl(model) else None
    return Encoder(
        component.name, length, *ids, hidden=tuple(hidden), pooled=pooled,
        expansions=expansions(component.embedding, tokenizer),
    )  # fmt: skip


def vae_settings(model: Model, found: Mapping[str, PipelineComponent]) -> Vae | None:
    """How latents become pictures; None where the pipeline has no autoencoder.

    Raises:
        UnsupportedError: Its latents are scaled in a way that diffusers' own pipeline does not read.
    """
    return _latent_settings(model, found.get("vae_decoder"))


def preview_settings(model: Model, found: Mapping[str, PipelineComponent]) -> Vae | None:
    """How latents become previews; None where nothing makes them. Errors are those of `vae_settings`."""
    return _latent_settings(model, found.get("preview_decoder"))


def _latent_settings(model: Model, decoder: PipelineComponent | None) -> Vae | None:
    if decoder is None:
        return None
    config, where = decoder.config, decoder.folder
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if config.get("shift_factor"):
        raise UnsupportedError(f"{where}: shift_factor {config['shift_factor']!r}; supported: none")
    if (mean is None) != (std is None) or (mean is not None and not _is_xl(model)):
        raise UnsupportedError(f"{where}: latents_mean {mean!r}, latents_std {std!r}; supported: both, in SDXL")
    return Vae(
        float(config.get("scaling_factor", 1.0)),
        _downscale(config),
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
    )


def write_pipeline_files(model: Model, scheduler: Any, folder: Path) -> None:
    """Writes what readers of diffusers' pipelines look for: model_index.json, the sampler's settings, the tokenizers.

    Args:
        scheduler: The sampler of the bundle's operating point, diffusers' own.
        folder: The root of the tree.
    """
    listed = read_json(model.home / "model_index.json")
    there = {*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "unet", "vae", "scheduler"}
    for name, value in listed.items():
        if isinstance(value, list) and name not in there:  # a safety checker, an image encoder
            listed[name] = [None, None]
    listed["scheduler"] = ["diffusers", type(scheduler).__name__]
    if model.vae is not None:
        listed["vae"] = ["diffusers", read_json(_vae_source(model)[0] / "config.json")["_class_name"]]
    write_json(folder / "model_index.json", listed)
    # JSON has no infinity, which diffusers writes for a default all the same: OpenVINO GenAI cannot read that.
    settings = json.loads(scheduler.to_json_string())
    finite = {key: value for key, value in settings.items() if not isinstance(value, float) or math.isfinite(value)}
    write_json(folder / "scheduler" / "scheduler_config.json", finite)
    for encoder in TEXT_ENCODERS:
        source = tokenizer_folder(model.home, encoder)
        if _is_listed(listed, encoder):
            write_tokenizer(source, folder / source.name, all_tokens(model.embedding))
