"""Observers of a federation: measuring, records, progress; one small file each."""

from fedlora.server.observers.base import Observer, RoundEnd
from fedlora.server.observers.evaluation import PersonalMetrics, ServerEvaluation
from fedlora.server.observers.progress import Progress, train_loss
from fedlora.server.observers.records import Checkpoints, MetricsFile
from fedlora.server.observers.trackers import Trackers

__all__ = [
    "Checkpoints",
    "MetricsFile",
    "Observer",
    "PersonalMetrics",
    "Progress",
    "RoundEnd",
    "ServerEvaluation",
    "Trackers",
    "train_loss",
]
