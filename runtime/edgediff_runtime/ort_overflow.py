"""Whether ONNX Runtime's int8 kernels overflow on this processor.

On x64 without VNNI two products of unsigned by signed bytes are added in 16 bits, which fit only half of the largest
such sum. ONNX Runtime also has exact kernels, and uses them wherever they are requested: on a processor with VNNI too,
where a step takes 1.6 to 1.9 times as long with them (benchmarks/README.md). It does not tell which processor it has
found, so a small matmul is tried.
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
    """Whether the sum of products of the largest unsigned and signed bytes is wrong."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(base64.b64decode(PRODUCT), options, providers=["CPUExecutionProvider"])
    unsigned, signed = np.full((SIZE, SIZE), 255, np.uint8), np.full((SIZE, SIZE), 127, np.int8)
    (made,) = session.run(["c"], {"a": unsigned, "b": signed})
    return not np.array_equal(made, unsigned.astype(np.int32) @ signed.astype(np.int32))
