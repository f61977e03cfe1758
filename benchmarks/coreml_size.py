"""How much larger is one Core ML package of two functions than the packages of the parts? grocery-32, fp16.

The bar: at most 1.10 times the sum of the split packages; the parts that both functions have are stored once.
"""

import tempfile
from pathlib import Path

from measure import machine

import edgediff
from edgediff.config.floors import VerifyConfig
from edgediff.targets.coreml import CoreMLConfig

BAR = 1.10


def main() -> None:
    """Exports both layouts and adds up their files."""
    print(machine())
    model = edgediff.load_model("grocery-32")
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("split", "pair"):
            bundle = Path(folder) / layout
            config = edgediff.ExportConfig(
                targets=("coreml",), coreml=CoreMLConfig(layout=layout), verify=VerifyConfig(mode="graphs")
            )
            edgediff.export_bundle(model, bundle, config)
            sizes[layout] = sum(file.stat().st_size for file in (bundle / "coreml").rglob("*") if file.is_file())
    ratio = sizes["pair"] / sizes["split"]
    for layout, size in sizes.items():
        print(f"{layout}: {size:,} bytes")
    print(f"pair / split: {ratio:.3f} (bar: {BAR:.2f}) {'ok' if ratio <= BAR else 'MISSED'}")


if __name__ == "__main__":
    main()
