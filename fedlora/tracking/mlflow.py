"""MLflow: a run of the server that ``MLFLOW_TRACKING_URI`` names, else of ``mlflow.db`` beside the run folders."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, final

from filelock import FileLock

from fedlora.tracking.base import TrackedRun, Tracker, numbers, step, texts

_BATCH = 100  # parameters that MLflow takes at once


@final
class MlflowTracker(Tracker):
    """Writes parameters, metrics by round, and texts as tags.

    Args:
        client: MLflow's client.
        run_id: The run.
    """

    packages = ("mlflow", "sqlalchemy", "alembic")
    install = "pip install 'fedlora[mlflow]'  # or: pip install mlflow"

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """Make a run, or go on with the one of a run that is continued."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.shared / 'mlflow.db'}"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedlora"
        with FileLock(run.shared / ".mlflow.lock"):  # runs side by side would both make its tables
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else client.create_experiment(name)
        known = (run.own / "mlflow.id").is_file()
        made = "" if known else client.create_run(experiment, run_name=run.name).info.run_id
        run_id, _ = run.identity("mlflow", made)
        tracker = cls(client, run_id)
        if known:
            client.update_run(run_id, status="RUNNING")
            return tracker
        params = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), _BATCH):
            client.log_batch(run_id, params=params[first : first + _BATCH])
        for line in run.earlier:
            tracker.log(line)
        return tracker

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a round's numbers."""
        self._log(numbers(line), int(line["round"]))

    def _log(self, values: Mapping[str, float], at: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(name, value, now, at) for name, value in values.items()])

    def finish(self, result: Mapping[str, Any] | None, outside: Sequence[str]) -> None:
        """Write the result, and end the run."""
        self._log(numbers(result or {}, "result/"), step(result))
        tags = texts(result or {}, "result/") | ({"outside the guarantee": ", ".join(outside)} if outside else {})
        for name, text in tags.items():
            self._client.set_tag(self._run_id, name, text)
        self._client.set_terminated(self._run_id, "FINISHED" if result is not None else "FAILED")
