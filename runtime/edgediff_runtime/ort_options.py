"""ONNX Runtime's options where a bundle's graphs were measured to be fastest and to take the least memory."""

from typing import Any

from edgediff_runtime.ort_overflow import bytes_overflow


def session_options(int8: bool, threads: int | None = None, stored: bool = False, low_memory: bool = False) -> Any:
    """Makes onnxruntime's ``SessionOptions``.

    Args:
        int8: Whether the graphs have int8 matmuls. On x64 without VNNI the usual kernels add pairs of them in 16 bits,
            which overflows; slower ones, which are asked for there, do not.
        stored: Whether weights are stored in fewer bits than they are multiplied in: they are made once, when the graph
            is opened, and not in each run.
        low_memory: Give tensors back to the system as soon as they are of no more use; and make such weights in each
            run, one after the other: slower, and a graph takes little more memory than its files and its features.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Each graph has its own threads: those of one would still spin while the next one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(int8 and bytes_overflow())))
    # The arena keeps what it once took, and takes twice as much each time: at Stable Diffusion 1.5's size 2.4 GB in
    # place of 1.6, for 4 % of the time.
    options.enable_cpu_mem_arena = not low_memory
    if stored and low_memory:
        # Where ONNX Runtime multiplies by blocks of bits, it would else round the features to eight bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    elif stored:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def options_key(int8: bool, stored: bool) -> str:
    """What `session_options` makes of its arguments here, as far as it changes an optimized graph."""
    return f"int8={int8 and bytes_overflow()} stored={stored}"
