# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a search found, and the page that holds them."""

from search.report.figure import draw_pattern
from search.report.page import remake_reports, report_run, write_report
from search.report.pareto import draw_front, front_table, write_front
from search.report.peers import Comparison
from search.report.record import RunRecord, record_run

__all__ = [
    "Comparison",
    "RunRecord",
    "draw_front",
    "draw_pattern",
    "front_table",
    "record_run",
    "remake_reports",
    "report_run",
    "write_front",
    "write_report",
]
