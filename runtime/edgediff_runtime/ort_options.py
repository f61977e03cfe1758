"""ONNX Runtime's options for a bundle's graphs, as the manifest recommends."""

from typing import Any

from edgediff_runtime.manifest import SessionSettings
from edgediff_runtime.ort_overflow import bytes_overflow


def session_options(settings: SessionSettings, threads: int | None = None) -> Any:
    """Onnxruntime's ``SessionOptions`` for a target's settings; `threads` None leaves the number to ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = settings.memory_arena
    options.enable_mem_pattern = settings.memory_pattern
    entries = {
        "session.force_spinning_stop": settings.stop_spinning,
        "session.x64quantprecision": settings.exact_int8 and bytes_overflow(),
    }
    for entry, is_on in entries.items():
        options.add_session_config_entry(entry, str(int(is_on)))
    return options
