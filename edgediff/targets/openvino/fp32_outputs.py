"""fp16 models on the CPU, which computes in fp32, with outputs that are not rounded."""

from typing import Any

from edgediff.extras import import_extra
from edgediff_runtime import Bundle
from edgediff_runtime.manifest import Graph
from edgediff_runtime.openvino_session import OpenVinoSession


class Fp32Outputs(OpenVinoSession):
    """A component's models with every output in fp32."""

    def _read(self, bundle: Bundle, graph: Graph) -> Any:
        """Reads a model, checks it, and changes its outputs."""
        openvino = import_extra("openvino", "verifying OpenVINO's models", "openvino")
        steps = openvino.preprocess.PrePostProcessor(super()._read(bundle, graph))
        for tensor in graph.outputs:
            steps.output(tensor.name).tensor().set_element_type(openvino.Type.f32)
        return steps.build()
