"""What a run measures: the table of exported metrics; `meter` holds the numbers of a process."""

from distnadam.metrics.table import METRICS, Metric

__all__ = ["METRICS", "Metric"]
