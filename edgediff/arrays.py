"""Arrays by name from a file: the embeddings of a prompt, made elsewhere."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgediff.errors import ConfigError


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads arrays by name.

    Args:
        path: A ``.safetensors`` or ``.npz`` file.

    Returns:
        The arrays.

    Raises:
        ConfigError: It cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path):  # numpy takes other files under this name too
                pass
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return dict(load_file(path))
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, SafetensorError) as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"conditioning {path} cannot be read as .safetensors or .npz: {reason}") from e
