"""int8 by ai-edge-quantizer, LiteRT's own: its recipes and its rounding.

Weights are int8, with a scale for each output channel. What goes into a convolution or a matmul is rounded

- by the range that it has in that run, for CPUs: 45.3 dB along the trajectory of drawings-64-student, and 43.1 where
  nothing stays wide;
- or by a range that was measured along whole trajectories, for NPUs. The quantizer's own calibration averages the
  ranges of its runs, and what goes beyond the average is cut off: 33.6 dB of a full step, where the outermost values
  give 39.1.
"""

from pathlib import Path
from typing import Any

from edgediff.extras import needing, quiet
from edgediff.targets.base import Job, converter_errors
from edgediff.targets.calibration import calibrate_for

# By the names of modules: what they write goes into skip connections or the picture, where no normalization follows.
WIDE = ".*(conv_in|conv_out|conv_shortcut).*"


def quantize_litert(path: Path, job: Job) -> None:
    """Makes a UNet's convolutions and matmuls int8, in place.

    Raises:
        UnsupportedError: The quantizer failed.
    """
    with needing("litert", "quantizing for LiteRT"), quiet():
        from ai_edge_quantizer import quantizer
    bits = {"dynamic": None, "int8": 8, "int16": 16}[job.config.activations]
    ranges = None if bits is None else _ranges(path, job, bits)
    job.say("quantizing for LiteRT")
    with converter_errors(f"{path.name}: ai_edge_quantizer"), quiet():
        made = quantizer.Quantizer(str(path))
        made.load_quantization_recipe(_recipe(bits).get_quantization_recipe())
        result = made.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        result.export_model(str(path), overwrite=True)


def _recipe(bits: int | None) -> Any:
    """What is quantized; `bits` of what goes into it, None where the kernels choose the range."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    manager = RecipeManager()
    if bits is None:
        manager.add_dynamic_config(".*", TFLOperationName.ALL_SUPPORTED, num_bits=8)
    else:
        for operation in (TFLOperationName.CONV_2D, TFLOperationName.FULLY_CONNECTED):
            manager.add_static_config(".*", operation, activation_num_bits=bits, weight_num_bits=8)
    manager.add_quantization_config(WIDE, TFLOperationName.CONV_2D, algorithm_key=AlgorithmName.NO_QUANTIZE)
    return manager


def _ranges(path: Path, job: Job, bits: int) -> Any:
    """Lowest and highest value of each tensor, by its name."""
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    calibration = calibrate_for(job)
    assert calibration is not None, "int8 has a calibration"
    rows = job.target.unet.batch
    assert rows is not None, "the format's batch is fixed"
    runs = {
        graph.function: calibration.runs(graph, rows=rows) for graph in job.target.unet.graphs if graph.file is not None
    }
    job.say("measuring ranges in LiteRT")
    with converter_errors(f"{path.name}: ai_edge_quantizer"), quiet():
        calibrator = Calibrator(path.read_bytes(), qsv_update_func=min_max_update)
        calibrator.calibrate(runs, _recipe(bits))
    return calibrator.get_model_qsvs()
