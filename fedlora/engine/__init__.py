"""The packed engine: grouped layers, per-client optimizers, local training and evaluation."""

from fedlora.engine.core import Engine, evaluate
from fedlora.engine.training import ClientResult, ClientWork, plan_batches, train_pack

__all__ = ["ClientResult", "ClientWork", "Engine", "evaluate", "plan_batches", "train_pack"]
