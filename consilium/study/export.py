"""Composition: tables and figures as files. In: what the page shows. Out: Markdown, LaTeX (booktabs), SVG and PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from consilium import checkpoint
from consilium.report.sections import Figure, Section
from consilium.report.tables import Cell, Table
from consilium.study import drawing

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "\u202f": r"\,", "\u2013": "--", "\u2026": r"\ldots{}", "\u2212": "-",
        "\u00d7": r"$\times$", "\u00b7": r"$\cdot$", **{letter: f"\\{letter}" for letter in "&%$#_{}"}}  # fmt: skip


def write(folder: Path, sections: Sequence[Section], notes: Sequence[str]) -> None:
    """Every table and figure of the sections, folded ones too; `notes` stand below each table."""
    tables: set[str] = set()
    figures: set[str] = set()
    for section in sections:
        for block in [*section.blocks, *(block for _, blocks in section.more for block in blocks)]:
            if isinstance(block, Table):
                path = folder / "tables" / _name(block.caption, tables)
                checkpoint.write_bytes(path.with_suffix(".md"), markdown(block, notes).encode())
                checkpoint.write_bytes(path.with_suffix(".tex"), latex(block, notes).encode())
            elif isinstance(block, Figure):
                path = folder / "figures" / _name(block.caption, figures)
                sheet = drawing.sheet(block, notes)
                checkpoint.write_bytes(path.with_suffix(".svg"), drawing.svg(sheet))
                checkpoint.write_bytes(path.with_suffix(".png"), drawing.png(sheet))


def _name(caption: str, taken: set[str]) -> str:
    """A caption as a file name; numbered where two are alike."""
    plain = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:80] or "untitled"
    name = next(f"{plain}{tail}" for tail in ["", *(f"-{k}" for k in range(2, 1000))] if f"{plain}{tail}" not in taken)
    taken.add(name)
    return name


def markdown(table: Table, notes: Sequence[str] = ()) -> str:
    """A pipe table below its caption."""
    align = ["---" if at < table.num_text else "---:" for at in range(len(table.head))]
    rows = [list(map(_one_line, row)) for row in table.rows]
    lines = ["| " + " | ".join(_pipe(cell) for cell in row) + " |" for row in [table.head, align, *rows]]
    said = [text for text in (*notes, table.note) if text]
    return "\n".join([f"**{table.caption}**", "", *lines, *(f"\n{text}" for text in said)]) + "\n"


def _pipe(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _one_line(cell: Cell) -> str:
    detail = cell.detail.replace("\n", ", ")
    badge = f" [{cell.badge}]" if cell.badge else ""
    return f"{cell.text}{badge}" + (f" ({detail})" if detail else "")


def latex(table: Table, notes: Sequence[str] = ()) -> str:
    """A table environment; needs the package booktabs."""
    columns = "".join("l" if at < table.num_text else "r" for at in range(len(table.head)))
    rows = [" & ".join(tex(_one_line(cell)) for cell in row) + r" \\" for row in table.rows]
    said = [rf"\par\footnotesize {tex(text)}" for text in (*notes, table.note) if text]
    head = " & ".join(tex(name) for name in table.head) + r" \\"
    opening = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(table.caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
    ]
    inside = [r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    lines = [*opening, *inside, *said, r"\end{table}"]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    """Text with nothing in it that LaTeX would take for a command."""
    return "".join(_TEX.get(letter, letter) for letter in text.replace("\n", " "))
