"""What verification asks of a bundle, part of the recipe: PSNR in dB by dtype."""

import math

import msgspec

from edgediff.config.choices import VerifyMode
from edgediff_runtime import manifest as m


class HalfFloors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Floors of graphs that compute in fp16, in dB of PSNR.

    `program_db` is of each graph in fp32 arithmetic against torch with weights rounded to fp16, which shows a wrong
    constant that rounding would hide. The others have every result rounded: whether fp16 is enough.
    """

    program_db: float = 100.0
    graph_db: float = 45.0
    composed_db: float = 45.0
    trajectory_db: float = 35.0


class QuantizedFloors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Floors of int8 graphs, in dB of PSNR: the ecosystem's usual one."""

    graph_db: float = 35.0
    composed_db: float = 35.0
    trajectory_db: float = 35.0


class WeightFloors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Floors of graphs whose weights have fewer bits, in dB of PSNR, by the format of the fewest bits among them.

    Of a graph, a composed step and the trajectory against torch with the weights as they were; against torch with the
    rounded ones a graph must reach `HalfFloors.program_db`.
    """

    fp16: float = 50.0
    int8: float = 35.0
    int4: float = 20.0
    palette8: float = 35.0
    palette6: float = 30.0
    palette4: float = 20.0
    palette3: float = 15.0
    palette2: float = 8.0


class VerifyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The floors, in dB of PSNR.

    Floors for fp32 against fp32, where only the order of additions differs: the ecosystem's usual 35 dB would let a
    weight that is five percent off pass.

    Attributes:
        mode: ``full`` runs whole trajectories; ``graphs`` stops after the composed steps.
        graph_db: Floor of each graph against the same module in torch; an int8 graph must reach it before quantization.
        composed_db: Floor of a step composed from the graphs against torch (a full one: the undivided UNet).
        trajectory_db: Floor of the final latents against torch with the same clock: the conversion error.
        caching_db: Floor of clock N against clock 1 in the same backend; None shows that error without a floor.
    """

    mode: VerifyMode = "full"
    graph_db: float = 100.0
    composed_db: float = 90.0
    trajectory_db: float = 70.0
    caching_db: float | None = None
    fp16: HalfFloors = HalfFloors()
    int8: QuantizedFloors = QuantizedFloors()
    weights: WeightFloors = WeightFloors()

    def floors(self, dtype: str, weights: m.WeightFormat | None = None) -> m.Floors:
        """The floors of a target's graphs; `weights` is the format of the fewest bits that weights are stored in."""
        chosen: VerifyConfig | HalfFloors | QuantizedFloors = {"fp16": self.fp16, "int8": self.int8}.get(dtype, self)  # type: ignore[assignment]
        least = math.inf if weights is None else getattr(self.weights, weights)
        return m.Floors(
            graph=min(chosen.graph_db, least),
            composed=min(chosen.composed_db, least),
            trajectory=min(chosen.trajectory_db, least),
            caching=self.caching_db,
            program=self.fp16.program_db if dtype == "fp16" or weights is not None else None,
        )
