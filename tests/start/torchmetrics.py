"""The names that Lightning takes of torchmetrics, which takes Matplotlib and SciPy along."""

__version__ = "1.0.0"


class Metric:
    """Metrics, of which Fabric makes no use."""


class MetricCollection:
    """As little."""
