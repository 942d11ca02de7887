"""The packed engine: grouped layers, per-client optimizers, local training and evaluation."""

from fedlora.engine.core import Engine, check_rows_apart, evaluate
from fedlora.engine.training import train_pack
from fedlora.engine.work import ClientResult, ClientWork, plan_batches

__all__ = [
    "ClientResult",
    "ClientWork",
    "Engine",
    "check_rows_apart",
    "evaluate",
    "plan_batches",
    "train_pack",
]
