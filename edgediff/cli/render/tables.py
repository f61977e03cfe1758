"""What the command line shows, as rich tables; nothing here prints."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgediff.doctor import Examination
from edgediff.inspect.survey import PARTS, Survey
from edgediff_runtime import Result
from edgediff_runtime.clock import letters
from edgediff_runtime.loop import OUTSIDE

if TYPE_CHECKING:
    from edgediff.bundle.rows import Finding, ParityReport
    from edgediff.cli.demo import Shown
    from edgediff.inspect.comparison import ComparisonRow, SpectralRow
    from edgediff.inspect.placement import Note


def parity_tables(report: "ParityReport") -> list[Table]:
    """One table for each backend that measured; the verdict, and backends that did not, in the last one's caption."""
    measured = list(dict.fromkeys(row.backend for row in report.rows if row.status == "measured"))
    tables = [_backend_table(backend, report) for backend in measured] or [Table("nothing was measured")]
    verdict = Text("every number is above its floor", "green") if report.ok else Text("FAILED", "bold red")
    absent = dict.fromkeys(row.note for row in report.rows if row.backend not in measured)
    tables[-1].caption = Text("\n").join([verdict, *(Text(f"not run: {note}", "dim") for note in absent)])
    return tables


def _backend_table(backend: str, report: "ParityReport") -> Table:
    table = Table(title=f"{backend} against torch", box=box.SIMPLE_HEAD)
    for name in ("check", "part", "worst output"):
        table.add_column(name)
    table.add_column("PSNR dB", justify="right")
    table.add_column("floor", justify="right")
    table.add_column("verdict")
    for row in report.rows:
        if row.backend != backend:
            continue
        shown = {
            True: Text("ok", "green"),
            False: Text("below its floor", "bold red"),
            None: Text("shown", "dim"),
        }[row.ok]
        if row.status == "not_run":
            shown = Text("not run", "dim")
        number = "-" if row.status == "not_run" else "not finite" if row.psnr_db is None else f"{row.psnr_db:.1f}"
        floor = "-" if row.floor_db is None else f"{row.floor_db:g}"
        table.add_row(row.check, row.part, row.output or "-", number, floor, shown)
    return table


def findings_table(report: "ParityReport") -> Table | None:
    """What comes near the ends of fp16's range; None where nothing computes in fp16."""
    if not report.findings:
        return None
    table = Table(title="fp16: the worst tensors", box=box.SIMPLE_HEAD)
    for name in ("graph", "tensor", "operation", "finding"):
        table.add_column(name)
    small: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.kind == "small-constant":
            small.setdefault(finding.graph, []).append(finding)
            continue
        words = Text(f"{finding.value:.1%} of fp16's range", "yellow" if finding.warns else "dim")
        if finding.kind == "overflow":
            words = Text(f"overflows: {finding.value:,.0f} numbers are not finite", "bold red")
        table.add_row(finding.graph, finding.tensor, finding.op, words)
    for graph, constants in small.items():
        least = min(constants, key=lambda finding: finding.value)
        words = Text(f"{len(constants)} below fp16's smallest normal number, the smallest {least.value:.2g}", "yellow")
        table.add_row(graph, least.tensor, "constants", words)
    return table


def report_tables(report: "ParityReport") -> list[Table]:
    """Everything that a verification found."""
    findings = findings_table(report)
    return [*([] if findings is None else [findings]), *parity_tables(report)]


def ledger_table(result: Result) -> Table:
    """One line for each step of a generation, and for each component outside of the loop, in milliseconds."""
    spent = {name for step in result.ledger for name, ms in step.ms.items() if ms > 0}
    names = [name for name in (*PARTS, *OUTSIDE) if name in spent]
    saved = f"the clock saved {result.flops_saved:.1%} of the UNet's FLOPs" if result.flops_saved else None
    table = Table(title="ledger, ms", caption=saved, show_footer=True, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("step", "sum")
    table.add_column("t", justify="right")
    table.add_column("runs")
    for name in names:
        total = sum(step.ms.get(name, 0.0) for step in result.ledger)
        # In a narrow terminal with eight columns both would be truncated to the same text.
        table.add_column(name.replace("highres_", "highres_\n"), f"{total:.1f}", justify="right", overflow="fold")
    table.add_column("step", f"{result.ms:.1f}", justify="right")
    for step in result.ledger:
        cells = [f"{step.ms[name]:.1f}" if name in step.ms else "-" for name in names]
        kind = "full" if step.full else "cached"
        table.add_row(str(step.index), f"{step.timestep:g}", kind, *cells, f"{sum(step.ms.values()):.1f}")
    for name, ms in result.stages.items():
        table.add_row("", "", name, *("-" for _ in names), f"{ms:.1f}")
    return table


def survey_tables(found: Survey) -> list[Table]:
    """Parts and their cost; a schedule and what it saves; of a bundle first what else its manifest says."""
    parts = Table(
        box=box.SIMPLE_HEAD,
        title=f"{found.name}, cut at {found.cut}: one sample",
        caption="GFLOPs: convolutions and linear layers, 2 per multiply-add; attention matmuls apart, as the papers "
        "leave them out",
    )
    parts.add_column("part")
    for name in ("parameters", "GFLOPs", "attention", "together"):
        parts.add_column(name, justify="right")
    for part in (part for part in PARTS if part in found.cost):
        cost = found.cost[part]
        if part == "full":
            parts.add_section()
        plain, attention = 2e-9 * cost.macs, 2e-9 * cost.macs_attention
        parts.add_row(part, f"{cost.parameters:,}", f"{plain:,.2f}", f"{attention:,.2f}", f"{plain + attention:,.2f}")
    parts.add_row("cache", f"{found.cache_bytes:,} bytes", "", "", "")
    mask = letters(found.mask)
    schedule = Table(
        box=box.SIMPLE_HEAD,
        title=f"{len(found.mask)} steps, batch {found.batch}, clock {found.clock} ({mask})",
    )
    schedule.add_column("TFLOPs")
    for name in ("clock 1", "this clock", "saved"):
        schedule.add_column(name, justify="right")
    for name, attention in (("without attention matmuls", False), ("with them", True)):
        always = found.tflops((True,) * len(found.mask), attention)
        schedule.add_row(
            name,
            f"{always:.4g}",
            f"{found.tflops(found.mask, attention):.4g}",
            f"{found.saved(attention):.1%}",
        )
    components = [_components_table(found.components)] if found.components else []
    if not found.facts:
        return [parts, *components, schedule]
    facts = Table(show_header=False, box=box.SIMPLE)
    facts.add_column("")
    facts.add_column("", overflow="fold")
    for what, answer in found.facts.items():
        facts.add_row(what, Text(answer))
    return [facts, *components, parts, schedule]


def _components_table(components: Sequence[Mapping[str, Any]]) -> Table:
    """What a pipeline's components are and cost, or what a bundle has of them."""
    table = Table(box=box.SIMPLE_HEAD, title="components")
    of_bundle = "bytes" in components[0]
    words = ("target", "component", "stage", "dtype", "batch") if of_bundle else ("component", "class")
    for name in words:
        table.add_column(name, overflow="fold")
    measured = any(entry.get("peak_bytes") is not None for entry in components)
    for name in (
        ("MB", *(["peak MB"] if measured else []), "graph floor")
        if of_bundle
        else ("parameters", "GFLOPs", "attention")
    ):
        table.add_column(name, justify="right")
    for entry in components:
        row = ["any" if entry[name] is None else str(entry[name]) for name in words]
        if of_bundle:
            peak = entry["peak_bytes"]
            row += [f"{entry['bytes'] / 1e6:,.2f}"]
            row += ["-" if peak is None else f"{peak / 1e6:,.2f}"] if measured else []
            row += [f"{entry['floors_db']['graph']:g} dB"]
        else:
            gflops, attention = entry["gflops"], entry["gflops_attention"]
            row += [f"{entry['parameters']:,}", f"{gflops:,.3f}", f"{attention:,.3f}"]
        table.add_row(*row)
    return table


def comparison_table(rows: "Iterable[ComparisonRow]") -> Table:
    """Clockwork Diffusion's table counted here, beside the published figures."""
    rows = list(rows)
    clocked = next(row.survey for row in rows if row.clockwork)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Clockwork Diffusion's table, {len(clocked.mask)} steps: TFLOPs of the UNet",
        caption=f"clock {clocked.clock}, {clocked.cut}; learned adaptor counted in, "
        f"{2e-9 * clocked.cost['adaptor'].macs:.1f} GFLOPs a row\n"
        "ours: 2 FLOPs per multiply-add, attention matmuls left out as in the paper; + attn.: with them",
    )
    table.add_column("", no_wrap=True)
    for name in ("batch", "ours", "paper", "+ attn.", "saved", "paper", "+ attn."):
        table.add_column(name, justify="right")
    for row in rows:
        saved = {"ours": row.saved(attention=False), "paper": row.paper_saved, "+ attn.": row.saved(attention=True)}
        table.add_row(
            "  + Clockwork" if row.clockwork else row.survey.name,
            str(row.survey.batch),
            f"{row.tflops(attention=False):.2f}",
            f"{row.paper_tflops:.1f}",
            f"{row.tflops(attention=True):.2f}",
            *("" if x is None else f"{x:.0%}" if whose == "paper" else f"{x:.1%}" for whose, x in saved.items()),
        )
    return table


def spectral_table(rows: "Iterable[SpectralRow]") -> Table:
    """Spectral Diffusion's UNets counted here, beside the published figures; those not published are in brackets."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title="Spectral Diffusion's UNets, one sample",
        caption="MACs: multiply-adds, attention matmuls left out as in the paper; + attn.: they\n"
        "in brackets: not in the paper's print, counted on CompVis' configurations\n"
        "ratio: the teacher's MACs over these; the abstract says 8 to 18 times",
    )
    table.add_column("task")
    table.add_column("UNet")
    for name in ("params, M", "published", "MACs, G", "published", "+ attn.", "ratio"):
        table.add_column(name, justify="right")
    for task, lines in groupby(rows, key=lambda row: row.task):
        words = iter(task.split("/"))
        for row in lines:
            parameters, macs = row.published_parameters / 1e6, row.published_macs / 1e9
            printed = row.source == "published"
            table.add_row(
                next(words, ""),
                row.role,
                f"{row.cost.parameters / 1e6:.2f}",
                f"{parameters:g}" if printed else f"({parameters:.2f})",
                f"{row.cost.macs / 1e9:.2f}",
                f"{macs:g}" if printed else f"({macs:.2f})",
                f"{row.cost.macs_attention / 1e9:.2f}",
                "" if row.role == "teacher" else f"{row.ratio:.1f}x",
            )
        table.add_section()
    return table


def doctor_tables(found: Examination) -> list[Table]:
    """Versions, abilities and known-bad pairs."""
    versions = Table(box=box.SIMPLE_HEAD, title=", ".join(f"{key} {value}" for key, value in found.machine.items()))
    for name in ("package", "installed", "tested with"):
        versions.add_column(name)
    for name, both in found.versions.items():
        installed = both["installed"] or "-"
        style = "green" if (both["installed"] or "").split("+")[0] == both["tested"] else "yellow"
        versions.add_row(name, Text(installed, style), both["tested"])
    abilities = Table(box=box.SIMPLE_HEAD, title="this machine")
    abilities.add_column("can")
    abilities.add_column("")
    for what, answer in found.abilities.items():
        abilities.add_row(what, Text(answer, "green" if answer == "yes" else "yellow"))
    tables = [versions, abilities]
    if found.known_bad:
        bad = Table(box=box.SIMPLE_HEAD, title="known to fail")
        bad.add_column("pair")
        for sentence in found.known_bad:
            bad.add_row(Text(sentence, "red"))
        tables.append(bad)
    return tables


def demo_tables(shown: "Shown") -> list[Table]:
    """What the demo did: verification, ledger, savings, and where everything is."""
    survey, clocks = shown.survey, ("clock 1", f"clock {shown.survey.clock}")
    saved = Table(
        box=box.SIMPLE_HEAD,
        title=f"{survey.name}: {clocks[1]} against clock 1, {len(survey.mask)} steps, "
        f"{len(shown.clocked.latents)} images",
    )
    saved.add_column("")
    for name in (*clocks, "saved"):
        saved.add_column(name, justify="right")
    masks = ((True,) * len(survey.mask), survey.mask)
    whole = [result.ms for result in (shown.always, shown.clocked)]
    loops = [result.ms - sum(result.stages.values()) for result in (shown.always, shown.clocked)]
    for name, (always, clocked) in {
        "GFLOPs per image, without attention matmuls": [1e3 * survey.tflops(mask, False) for mask in masks],
        "GFLOPs per image, with them": [1e3 * survey.tflops(mask, True) for mask in masks],
        "UNet loop, ms": loops,
        **({"from the prompts to the pixels, ms": whole} if shown.prompts else {}),
    }.items():
        saved.add_row(name, f"{always:,.1f}", f"{clocked:,.1f}", f"{1 - clocked / always:.1%}")
    where = Table(show_header=False, box=box.SIMPLE)
    where.add_column("")
    where.add_column("", overflow="fold")
    for what, path in {"bundle": shown.bundle, **shown.pictures}.items():
        where.add_row(what, str(path))
    return [*report_tables(shown.report), ledger_table(shown.clocked), saved, where]


def placement_table(notes: Iterable["Note"]) -> Table:
    """One line for each rule that found something: where, in which graphs, what to do about it, and who says so."""
    found: dict[str, list[Note]] = {}
    for note in notes:
        found.setdefault(note.rule.id, []).append(note)
    caption = "known, not measured: the device decides" if found else "nothing that is known to"
    table = Table(title="what falls off the accelerator", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0))
    table.add_column("rule", no_wrap=True)
    table.add_column("operations of each graph", overflow="fold", ratio=2)
    table.add_column("what happens, and what to do", overflow="fold", ratio=3)
    for rule, lines in found.items():
        graphs = []
        for note in lines:
            ops = ", ".join(f"{count} {op}" for op, count in note.ops.items())
            graphs.append(f"{note.graph}: {ops}" + (f" ({note.details[0]})" if note.details else ""))
        known = lines[0].rule
        source = (f"{known.title}, {known.source}", f"dim link {known.source}")
        words = Text.assemble(known.says, "\n", (known.rewrite, "green"), "\n", source)
        table.add_row(rule, Text("\n".join(graphs)), words)
    return table
