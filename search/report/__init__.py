# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a search found."""

from search.report.figure import draw_pattern

__all__ = ["draw_pattern"]
