"""Manifest, statistics, pictures and cards."""

from hf_r2.report.card import render_card
from hf_r2.report.manifest import Manifest
from hf_r2.report.plots import weight_histograms
from hf_r2.report.statistics import WeightStatistics, weight_statistics
from hf_r2.report.tables import result_table

__all__ = [
    "Manifest",
    "WeightStatistics",
    "render_card",
    "result_table",
    "weight_histograms",
    "weight_statistics",
]
