"""Manifests that every runtime reads, and changes to them that every runtime refuses."""

from typing import Any

COMPONENTS: list[str | int] = ["targets", 0, "components"]
UNET: list[str | int] = [*COMPONENTS, "unet"]
FIRST: list[str | int] = ["graphs", 0]
FLOORS = {"graph": 100.0, "composed": 90.0, "trajectory": 70.0, "caching": None}
OTHER = {"stage": "decode", "dtype": "fp32", "batch": None, "floors": FLOORS, "graphs": []}
VAE = {"scaling_factor": 0.13025, "downscale": 2}
# Where in which manifest a value is put, and why a reader refuses the result. "remove" takes the key away.
BAD: tuple[tuple[str, list[str | int], Any, str], ...] = (
    ("class", ["format_version"], 3, "a newer format"),
    ("class", ["format_version"], 1, "an older format, which was never released"),
    ("class", ["surprise"], 1, "an unknown key"),
    ("class", ["scheduler", "name"], "ddpm", "a sampler that no runtime has"),
    ("class", ["sample", "height"], 0, "a size of 0"),
    ("class", ["sample", "in_channels"], 2, "fewer channels in than the latent has"),
    ("class", ["operating_point", "clock"], 3, "a mask that is not the clock's"),
    ("class", ["operating_point", "mask", 0], 0, "a first step that is not full"),
    ("class", ["operating_point", "seed"], 5, "a seed that is a number"),
    ("class", ["operating_point", "seed"], "05", "a seed that is not plain decimal text"),
    ("class", ["operating_point", "seed"], "18446744073709551616", "a seed of 2^64"),
    ("class", ["operating_point", "guidance_scale"], 0, "guidance of 0"),
    ("class", ["conditioning", "labels"], [], "classes without names"),
    ("class", ["conditioning", "tensors"], [], "a condition without tensors"),
    ("class", ["conditioning", "null_label"], 9, "a null class beyond the classes"),
    ("class", ["adaptor", "kind"], "mlp", "an adaptor of an unknown kind"),
    ("class", ["adaptor", "sha256"], "0" * 64, "an identity with weights"),
    ("class", ["targets"], [], "no target"),
    ("class", ["targets", 0, "target"], "tensorrt", "no target that this runtime knows"),
    ("class", ["targets", 0, "deployment_target"], "iOS18", "a field of another target"),
    ("class", ["targets", 0, "components", "unet", "stage"], "decode", "a UNet that is not run by the loop"),
    ("class", ["targets", 0, "components", "unet", "layout"], None, "a UNet without a layout"),
    ("class", ["targets", 0, "components", "unet", "batch"], 0, "a batch of 0"),
    ("class", ["targets", 0, "components", "unet", "floors", "graph"], 0, "a floor of 0 dB"),
    ("class", ["targets", 0, "components", "unet", "graphs", 0, "frequency"], "generation", "a frequency that is gone"),
    ("class", ["targets", 0, "components", "unet", "graphs", 0, "inputs", 0, "name"], "emb", "an input nobody makes"),
    ("class", ["targets", 0, "components", "unet", "graphs", 0, "outputs", 0, "name"], "out", "no out_sample"),
    ("class", ["targets", 0, "components", "unet", "graphs", 0, "inputs", 0, "shape", 2], 7, "another size of sample"),
    ("class", ["targets", 0, "components", "unet", "graphs", 1, "name"], "full", "two graphs of one name"),
    ("class", ["targets", 0, "components", "unet", "files", 0], "../x", "a component of files that are not there"),
    ("class", ["cost", "full"], "remove", "a step without its cost"),
    ("class", ["files", "onnx/unet/full.onnx", "sha256"], "0", "a hash that is none"),
    ("text", ["targets", 0, "specification_version"], 7, "a model format that is not the system's"),
    ("text", ["targets", 0, "components", "unet", "dtype"], "fp32", "float16 tensors in fp32"),
    ("text", ["targets", 0, "components", "unet", "floors", "program"], None, "fp16 without a floor for the program"),
    ("class", ["prompt"], {"encoders": []}, "prompts of a model without text"),
    ("class", ["vae"], {"scaling_factor": 1.0, "downscale": 8}, "a decoder of pixels"),
    ("pipeline", ["prompt"], None, "text encoders that are not described"),
    ("pipeline", ["prompt", "encoders"], [], "prompts without a text encoder"),
    ("pipeline", ["prompt", "encoders", 0, "component"], "vae_decoder", "a decoder that encodes text"),
    ("pipeline", ["prompt", "encoders", 0, "component"], "text_encoder_2", "the same text encoder twice"),
    ("pipeline", ["prompt", "encoders", 0, "max_length"], 2, "no room for a token"),
    ("pipeline", ["prompt", "encoders", 0, "max_length"], 64, "text encoders of different lengths"),
    ("pipeline", ["prompt", "encoders", 1, "pad"], -1, "a token id below 0"),
    ("pipeline", ["prompt", "encoders", 1, "expansions"], [[9]], "a token that stands for itself"),
    ("pipeline", ["prompt", "encoders", 1, "expansions"], [[9, -1]], "a token that stands for an id below 0"),
    ("pipeline", ["prompt", "encoders", 1, "expansions"], [[9, 10], [9, 11]], "a token that stands for two things"),
    ("pipeline", ["prompt", "encoders", 0, "hidden"], [], "no state that stands for the prompt"),
    ("pipeline", ["prompt", "encoders", 0, "hidden", 1], "hidden_states.2", "a state twice"),
    ("pipeline", ["prompt", "encoders", 0, "hidden", 0], "clip_skip.1", "a state that the text encoder does not give"),
    ("pipeline", ["prompt", "encoders", 0, "hidden", 0], "pooler_output", "a pooled text as the state of each token"),
    ("pipeline", ["prompt", "encoders", 1, "pooled"], "pooler_output", "a pooled text that no output gives"),
    ("pipeline", ["prompt", "encoders", 1, "pooled"], None, "text_embeds that no text encoder gives"),
    ("pipeline", ["prompt", "encoders", 0, "pooled"], "pooler_output", "two pooled texts"),
    ("pipeline", [*COMPONENTS, "text_encoder_2", *FIRST, "outputs", 0, "shape"], ["batch"], "pooled text of no width"),
    ("pipeline", [*COMPONENTS, "text_encoder", "graphs", 0, "outputs", 3, "shape", 2], 16, "layers of unlike widths"),
    ("pipeline", ["conditioning", "tensors", 0, "shape", 2], 32, "features of another width than the UNet takes"),
    ("pipeline", [*COMPONENTS, "text_encoder", "tokenizer"], "onnx/x.json", "a tokenizer that is not a file"),
    ("pipeline", [*COMPONENTS, "unet", "tokenizer"], "onnx/tokenizer/tokenizer.json", "a tokenizer of a UNet"),
    ("pipeline", [*COMPONENTS, "text_encoder", "stage"], "decode", "a text encoder that is run at the end"),
    ("pipeline", [*COMPONENTS, "vae_encoder", "stage"], "decode", "two decoders"),
    ("pipeline", [*COMPONENTS, "text_encoder", "graphs"], [], "a component without graphs"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "graphs", 0, "file"], None, "a decoder without a file"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "graphs", 0, "outputs"], [], "a decoder that gives nothing"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "graphs", 0, "inputs", 0, "shape", 2], 8, "a decoder of smaller latents"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "graphs", 0, "outputs", 0, "shape", 3], 64, "a picture of another size"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "batch"], 2, "a fixed batch in a graph of any"),
    ("pipeline", [*COMPONENTS, "text_encoder", "graphs", 0, "inputs", 0, "name"], "ids", "token ids of another name"),
    ("pipeline", [*COMPONENTS, "text_encoder", "graphs", 0, "inputs", 0, "shape", 1], 64, "another number of tokens"),
    ("pipeline", [*COMPONENTS, "safety_checker"], OTHER, "a component that no runtime knows"),
    ("pipeline", ["vae"], None, "a decoder that is not described"),
    ("pipeline", ["vae", "scaling_factor"], 0, "latents that are divided by 0"),
    ("pipeline", ["vae", "downscale"], 0, "a picture without pixels"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "graphs", 0, "outputs", 0, "shape", 2], "4*height", "a picture too high"),
    ("pipeline", [*COMPONENTS, "vae_decoder", "graphs", 0, "outputs", 0, "shape", 2], "depth", "an unknown symbol"),
    ("pipeline", [*COMPONENTS, "unet", "graphs", 0, "inputs", 0, "shape", 3], 16, "any height, one width"),
    ("pipeline", [*COMPONENTS, "unet", "further"], [{"height": 32, "width": 16, "graphs": []}], "any size, and others"),
    ("pipeline", ["sample", "multiple"], 3, "a usual size that is not a multiple"),
    ("pipeline", ["evidence", "sizes"], [[17, 16]], "evidence of a size that is not a multiple"),
    ("text", [*UNET, "further", 0, "height"], 3, "a further size that its graphs do not have"),
    ("text", [*UNET, "further", 0, "graphs"], [], "a further size without graphs"),
    ("text", [*UNET, "further", 0, "graphs", 0, "function"], "full", "one function for two sizes"),
    ("pipeline", ["preview"], None, "a preview decoder that is not described"),
    ("pipeline", ["preview", "scaling_factor"], 0, "latents of a preview that are divided by 0"),
    ("pipeline", ["preview", "downscale"], 4, "a preview that is smaller than its decoder's"),
    ("pipeline", [*COMPONENTS, "preview_decoder", "stage"], "decode", "a preview that is the picture"),
    ("class", ["preview"], {"scaling_factor": 1.0, "downscale": 8}, "a preview of pixels"),
    ("pipeline", ["lora"], None, "low-rank factors that are not described"),
    ("pipeline", ["lora", "rank"], 3, "low-rank factors of another rank"),
    ("pipeline", ["lora", "layers", "lowres", 0, "inputs"], 0, "a layer without features"),
    ("pipeline", ["lora", "layers", "lowres"], [], "a part without layers"),
    ("pipeline", ["vae", "mean"], [0, 0, 0, 0], "a mean without a deviation"),
    ("pipeline", ["vae"], {**VAE, "mean": [0, 0, 0], "std": [1, 1, 1]}, "means of fewer channels"),
    ("pipeline", ["vae"], {**VAE, "mean": [0, 0, 0, 0], "std": [1, 1, 1, 0]}, "a deviation of 0"),
)  # fmt: skip


def changed(manifest: Any, at: list[str | int], value: Any) -> Any:
    """A copy of plain data with one value put, or removed."""
    if not at:
        return value
    first, *rest = at
    if isinstance(manifest, list):
        return [changed(each, rest, value) if i == first else each for i, each in enumerate(manifest)]
    if not rest and value == "remove":
        return {key: each for key, each in manifest.items() if key != first}
    return {**manifest, first: changed(manifest.get(first), rest, value)}
