"""Reports: one self-contained HTML file and its tables, built from run folders alone."""

from __future__ import annotations

from reports.builder import build_report

__all__ = ["build_report"]
