"""MLflow: where MLFLOW_TRACKING_URI says, else the database `RUN/mlflow.db`, which needs no server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from mokd.config.leaves import leaves
from mokd.loggers.base import Continued, Forgetful

_AT_ONCE = 500  # metrics and parameters that a call takes, at most 1,000 and 100


class MLflow(Forgetful):
    """A run of the experiment MLFLOW_EXPERIMENT_NAME or `mokd`, which later attempts go on with."""

    name = "mlflow"

    def open(self, continued: Continued, known: str | None) -> str:
        """The configuration becomes its parameters, by key path."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{continued.run.path / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mokd")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        run_id = str(self._client.create_run(experiment, run_name=continued.run.path.name).info.run_id)
        parameters = [Param(key, str(value)[:500]) for key, value in leaves(continued.config)]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(run_id, params=parameters[start : start + 100])
        return run_id

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """All of a step together."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        for start in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[start : start + _AT_ONCE])

    def close(self) -> None:
        """Marks the run as finished until it goes on."""
        self._client.set_terminated(self._id)
