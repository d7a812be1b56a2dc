"""What a run measures: the table of its metrics, and the numbers of one process."""

from distnadam.metrics.table import METRICS, Metric

__all__ = ["METRICS", "Metric"]
