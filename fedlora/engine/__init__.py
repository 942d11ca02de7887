"""The packed engine: grouped layers, per-client optimizers, local training and evaluation."""

from fedlora.engine.apart import find_batching
from fedlora.engine.core import Batching, Engine, evaluate
from fedlora.engine.training import train_pack
from fedlora.engine.work import ClientResult, ClientWork, plan_batches

__all__ = [
    "Batching",
    "ClientResult",
    "ClientWork",
    "Engine",
    "evaluate",
    "find_batching",
    "plan_batches",
    "train_pack",
]
