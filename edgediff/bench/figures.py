"""A ledger as pictures: where a step's time goes, what the clock saves of it, and each backend's PSNR."""

from collections.abc import Callable, Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Any

from edgediff.bench.ledger import Contender, Ledger
from edgediff.bench.wording import number
from edgediff_runtime.loop import OUTSIDE

INK, SOFT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
# By part of a step; a whole step in one graph has one colour.
PARTS = MappingProxyType(
    {"highres_in": "#1f5fa8", "lowres": "#c2571a", "adaptor": "#e0a33e", "highres_out": "#5b9bd5", "step": "#6b6b6b",
     "other": "#b9b9b9"}
)  # fmt: skip
# A shape with each colour, for people who see few colours.
MARKS = (("#1f5fa8", "o"), ("#c2571a", "s"), ("#1a7f37", "D"), ("#7b3f98", "^"), ("#222222", "v"), ("#b03a2e", "P"))
WIDTH, DPI = 9.0, 130
BAR_INCHES = 0.42

Times = Mapping[tuple[str, str], Mapping[str, float]]


def figures(ledger: Ledger) -> dict[str, bytes]:
    """Draws what was measured, what was imported left out.

    Returns:
        PNGs: ``latency``; ``saved`` where the clock saves operations; ``quality``. None where nothing was measured.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in ledger.rows:
        times.setdefault((row.bundle, row.backend), {})[row.part] = row.median_ms
    known = [
        contender
        for contender in ledger.contenders
        if contender.status == "measured"
        and {"full", "loop"} <= times.get((contender.bundle, contender.backend), {}).keys()
    ]
    if not known:
        return {}
    many = len({contender.bundle for contender in known}) > 1
    made = {"latency": _png(lambda axes: _latency(axes, known, times, many), 1.6 + 2 * BAR_INCHES * len(known))}
    if any(contender.ratio is not None for contender in known):
        made["saved"] = _png(lambda axes: _saved(axes, known, many), 4.6)
    made["quality"] = _png(lambda axes: _quality(axes, known, times, many), 4.6)
    return made


def _png(draw: Callable[[Any], None], height: float) -> bytes:
    # The Agg backend by name needs no display and changes no global setting.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draw(axes)
    held = BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _name(contender: Contender, many: bool) -> str:
    bundle = contender.bundle.replace("$", r"\$")  # else the text between two of them is drawn as a formula
    return f"{contender.backend}\n{bundle}" if many else contender.backend


def _latency(axes: Any, known: list[Contender], times: Times, many: bool) -> None:
    """Two bars for each contender, a full and a cached step, divided into their parts."""
    labelled: set[str] = set()
    longest = max(times[contender.bundle, contender.backend]["full"] for contender in known)
    for i, contender in enumerate(known):
        parts = times[contender.bundle, contender.backend]
        for kind, offset in (("full", -0.2), ("cached", 0.2)):
            if kind not in parts:
                continue
            left = 0.0
            for part, ms in divided(parts, kind).items():
                label = part if part not in labelled else None
                labelled.add(part)
                axes.barh(i + offset, ms, 0.36, left, color=PARTS[part], label=label, edgecolor="white", linewidth=0.6)
                left += ms
            axes.annotate(
                f"{kind} {number(left, 3)} ms", (left, i + offset), (4, 0), textcoords="offset points", va="center",
                fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_yticks(range(len(known)), [_name(contender, many) for contender in known], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * longest)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_xlabel("milliseconds of one step, median")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: list(PARTS).index(labels[i]))
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], fontsize=8, frameon=False, ncols=len(order),
        loc="lower center", bbox_to_anchor=(0.45, 1.0),
    )  # fmt: skip


def divided(parts: Mapping[str, float], kind: str) -> dict[str, float]:
    """The milliseconds of a ``full`` or ``cached`` step by graph and ``other``; one ``step`` where it is one graph.

    >>> divided({"highres_in": 1.0, "lowres": 3.0, "highres_out": 2.0, "full": 6.2, "cached": 3.1}, "cached")
    {'highres_in': 1.0, 'highres_out': 2.0, 'other': 0.10000000000000009}
    """
    middle = "lowres" if kind == "full" else "adaptor"
    graphs = {part: parts[part] for part in ("highres_in", middle, "highres_out") if part in parts}
    if not graphs:
        outside = sum(parts.get(part, 0.0) for part in OUTSIDE)
        return {"step": parts[kind] - outside, "other": outside}
    # The rest is hand-off, guidance and scheduler, and that medians do not add up to the median of the sum.
    return graphs | {"other": max(parts[kind] - sum(graphs.values()), 0.0)}


def _saved(axes: Any, known: list[Contender], many: bool) -> None:
    """Time saved against operations saved; on the dashed line they are equal."""
    shown = [contender for contender in known if contender.ratio is not None]
    ends = [end for contender in shown for end in (contender.time_saved_spread or (contender.time_saved or 0.0,))]
    most = 100 * max(*ends, *(contender.flops_saved or 0.0 for contender in shown)) * 1.15
    axes.plot([0, most], [0, most], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("dashed: every operation saved is time saved", (1, 0), (-6, 6), xycoords="axes fraction",
                  textcoords="offset points", ha="right", va="bottom", fontsize=8, color=SOFT)  # fmt: skip
    for contender, (colour, mark) in zip(shown, _marks(shown), strict=True):
        assert contender.flops_saved is not None
        assert contender.time_saved is not None
        label = f"{_name(contender, many).replace(chr(10), ', ')}: {contender.ratio:.2f}"
        axes.plot(100 * contender.flops_saved, 100 * contender.time_saved, mark, color=colour, markersize=7,
                  linestyle="none", label=label)  # fmt: skip
        if contender.time_saved_spread is not None:
            axes.vlines(100 * contender.flops_saved, *(100 * end for end in contender.time_saved_spread), color=colour,
                        linewidth=1)  # fmt: skip
    axes.set_xlim(0, most)
    axes.set_ylim(min(0, *(100 * end * 1.15 for end in ends)), most)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_xlabel("operations that the clock saves, %")
    axes.set_ylabel("time that it saves, %")
    axes.legend(fontsize=8, frameon=False, loc="upper left", title="time saved / FLOPs saved", title_fontsize=8)


def _quality(axes: Any, known: list[Contender], times: Times, many: bool) -> None:
    """PSNR against time: up and to the left is better."""
    for contender, (colour, mark) in zip(known, _marks(known), strict=True):
        if contender.psnr_db is None:
            continue
        where = times[contender.bundle, contender.backend]["loop"], contender.psnr_db
        label = _name(contender, many).replace("\n", ", ")
        axes.plot(*where, mark, color=colour, markersize=7, linestyle="none", label=label)
    axes.set_xscale("log")
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    low, high = axes.get_xlim()
    if high / low < 10:
        axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:,g}"))
        axes.tick_params(axis="x", which="minor", labelsize=7)
    else:
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_xlabel("milliseconds of all steps at the clock, median")
    axes.set_ylabel("PSNR of a step against the reference, dB")
    axes.legend(fontsize=8, frameon=False, loc="best")


def _marks(shown: list[Contender]) -> list[tuple[str, str]]:
    """A colour for each backend, a shape for each bundle where there are several."""
    backends = list(dict.fromkeys(contender.backend for contender in shown))
    bundles = list(dict.fromkeys(contender.bundle for contender in shown))
    if len(bundles) == 1:
        return [MARKS[backends.index(contender.backend) % len(MARKS)] for contender in shown]
    return [
        (
            MARKS[backends.index(contender.backend) % len(MARKS)][0],
            MARKS[bundles.index(contender.bundle) % len(MARKS)][1],
        )
        for contender in shown
    ]
