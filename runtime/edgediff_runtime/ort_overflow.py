"""Whether ONNX Runtime's kernels of eight bits overflow on this processor.

On x64 without VNNI a product of unsigned by signed bytes is added to its neighbour's in 16 bits, which hold no more
than half of the largest such sum. ONNX Runtime knows exact kernels, and uses them wherever it is told to: on a
processor with VNNI too, where a step takes 1.6 to 1.9 times as long with them (benchmarks/README.md). It does not say
which processor it has found, so it is asked for a sum.
"""

import base64
from functools import cache

import numpy as np

# The operator MatMulInteger alone, as a graph: uint8 [m, k] "a" and int8 [k, n] "b" give int32 [m, n] "c".
PRODUCT = (
    "CAg6YgoYCgFhCgFiEgFjIg1NYXRNdWxJbnRlZ2VyEgFnWhUKAWESEAoOCAISCgoDEgFtCgMSAWtaFQoBYhIQCg4IAxIKCgMSAWsKAxIBbmIVCgFj"
    "EhAKDggGEgoKAxIBbQoDEgFuQgQKABAN"
)
SIZE = 64


@cache
def bytes_overflow() -> bool:
    """Multiplies the largest unsigned by the largest signed bytes, and looks at the sum."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(base64.b64decode(PRODUCT), options, providers=["CPUExecutionProvider"])
    unsigned, signed = np.full((SIZE, SIZE), 255, np.uint8), np.full((SIZE, SIZE), 127, np.int8)
    (made,) = session.run(["c"], {"a": unsigned, "b": signed})
    return not np.array_equal(made, unsigned.astype(np.int32) @ signed.astype(np.int32))
