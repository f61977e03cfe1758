"""Manifests that every runtime reads, and changes to them that every runtime refuses."""

from typing import Any

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
