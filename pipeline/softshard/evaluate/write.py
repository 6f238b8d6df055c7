"""The two files of a report.

In: the record of an evaluation and the data of its plots. Out: `metrics.json`, the record as canonical JSON with
`base`, `ce` and `adapter` as keys at its top level, and `index.html`, one page that needs no other file. Same input,
same bytes.
"""

from __future__ import annotations

from softshard.evaluate.page import render_page
from softshard.evaluate.plots import PlotData
from softshard.evaluate.report import Report
from softshard.records.canonical import canonical_json
from softshard.storage import Store

__all__ = ["write_report"]


def write_report(report: Report, *, plot_data: PlotData, store: Store) -> None:
    """Write `metrics.json` and then `index.html` to the root of `store`, replacing older ones.

    Raises:
        StorageFull: no space is left; each file is written whole or not at all.
    """
    page = render_page(report, plot_data=plot_data)
    store.replace("metrics.json", canonical_json(report))
    store.replace("index.html", page.encode())
