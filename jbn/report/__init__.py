"""What batch norm does inside a network: a table of its layers, and pictures. The pictures need matplotlib."""

from jbn.report._pictures import plot_activations, plot_curves, style
from jbn.report._statistics import plot_statistics
from jbn.report._summary import LayerSummary, Summary, summary

__all__ = ["LayerSummary", "Summary", "plot_activations", "plot_curves", "plot_statistics", "style", "summary"]
