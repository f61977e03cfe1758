"""How ONNX Runtime is set for a bundle's graphs: what the manifest recommends, in ONNX Runtime's own words."""

from typing import Any

from edgediff_runtime.manifest import SessionSettings
from edgediff_runtime.ort_overflow import bytes_overflow


def session_options(settings: SessionSettings, threads: int | None = None) -> Any:
    """Makes the options of a session.

    Args:
        settings: The target's.
        threads: How many may be at work; ONNX Runtime's choice where None.

    Returns:
        onnxruntime's ``SessionOptions``.
    """
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
