"""A nightly Airflow DAG: the stages of one job, each one call of the command line.

Exit code 75 (try again) is a failure that Airflow retries, after ten minutes, four times; any other failure is not
retried. Only one run at a time: if last night's run has not finished, tonight's waits for it. On SIGTERM, which Airflow
sends to a task that is stopped or has taken too long, softshard finishes or drops its running parts.

For Airflow 3 with apache-airflow-providers-standard, on workers where `softshard` is installed.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

JOB = "/etc/softshard/letters.yaml"
STAGES = ("corpus", "teacher", "targets", "train", "evaluate")
TRY_AGAIN = 75


class SoftshardOperator(BaseOperator):
    """One stage of a job; its output is the task's log."""

    template_fields = ("job",)

    def __init__(self, *, job: str, stage: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.stage = stage
        self.hook = SubprocessHook()

    def execute(self, context: Any) -> None:
        """Run the stage. Raises AirflowException, to be retried, or AirflowFailException."""
        environment = {"SOFTSHARD_LOG": "-", **os.environ}
        result = self.hook.run_command(["softshard", self.stage, self.job, "--json"], env=environment)
        if result.exit_code == TRY_AGAIN:
            raise AirflowException(f"softshard {self.stage} ended with {TRY_AGAIN}, try again: {result.output}")
        if result.exit_code != 0:
            raise AirflowFailException(f"softshard {self.stage} ended with {result.exit_code}: {result.output}")

    def on_kill(self) -> None:
        """Ask softshard to stop."""
        self.hook.send_sigterm()


with DAG(
    dag_id="softshard_letters",
    schedule="0 1 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=20),
    default_args={"retries": 4, "retry_delay": timedelta(minutes=10)},
    tags=["softshard"],
) as dag:
    before = None
    for stage in STAGES:
        task = SoftshardOperator(task_id=stage, job=JOB, stage=stage)
        if before is not None:
            before >> task
        before = task
