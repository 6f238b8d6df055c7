"""OpenLineage events of a run: START, then COMPLETE or FAIL, with the sources as inputs and the targets as output.

Configured like every OpenLineage client: OPENLINEAGE_URL, OPENLINEAGE__TRANSPORT__..., OPENLINEAGE_CONFIG, or
openlineage.yml in the working folder or in ~/.openlineage. It is off if none of these exists or if OPENLINEAGE_DISABLED
is true. OPENLINEAGE_NAMESPACE sets the job's namespace, OPENLINEAGE_PARENT_ID (namespace/name/run) the run that started
this one. A failure to send an event never ends a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from softshard.errors import ExtraMissing, JobInvalid
from softshard.telemetry.redaction import without_credentials
from softshard.telemetry.reporter import EventValue, SilentReporter

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient

__all__ = ["DatasetName", "LineageReporter", "dataset_name", "is_configured"]

DatasetName = tuple[str, str]
"""Namespace and name."""

_PRODUCER = f"pkg:pypi/softshard@{version('softshard')}"
_FILE = "openlineage.yml"


def is_configured() -> bool:
    """Whether OpenLineage is configured and not disabled."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return False
    named = {"OPENLINEAGE_URL", "OPENLINEAGE_CONFIG"} & set(os.environ)
    transport = any(name.startswith("OPENLINEAGE__TRANSPORT") for name in os.environ)
    files = (Path(_FILE), Path.home() / ".openlineage" / _FILE)
    return bool(named) or transport or any(file.is_file() for file in files)


def dataset_name(uri: str) -> DatasetName:
    """OpenLineage's name of a dataset: `file` and an absolute path, or scheme and host, and the path there."""
    if "://" not in uri or uri.startswith("file://"):
        return "file", str(Path(uri.removeprefix("file://")).absolute())
    parts = urlsplit(without_credentials(uri))
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}", parts.path.strip("/") or "/"


class LineageReporter(SilentReporter):
    """Sends what a run reads and writes to an OpenLineage server; ignores messages and progress.

    Args:
        run: a UUID.
        on_failure: called with a message the first time an event cannot be sent.

    Raises:
        ExtraMissing: openlineage-python is not installed.
        JobInvalid: its settings are wrong.
    """

    def __init__(
        self,
        *,
        run: str,
        job: str,
        inputs: Sequence[DatasetName],
        output: DatasetName,
        on_failure: Callable[[str], None],
    ) -> None:
        self._client = _client()
        self._run, self._job = run, job
        self._inputs, self._output = tuple(inputs), output
        self._parent = _parent()
        self._on_failure = on_failure
        self._failed = False
        self._targets: dict[str, EventValue] | None = None

    def event(self, name: str, /, **values: EventValue) -> None:
        """Send the start and the end of a run; `targets_complete` supplies the output's statistics for the end."""
        if name == "targets_complete":
            self._targets = values
        elif name == "run_started":
            self._emit("START", {})
        elif name == "run_finished" and values.get("exit_code") == 0:
            self._emit("COMPLETE", {})
        elif name == "run_finished":
            from openlineage.client.facet_v2 import error_message_run

            message = f"exit code {values.get('exit_code')}: {values.get('error')}"
            facet = error_message_run.ErrorMessageRunFacet(
                message=message, programmingLanguage="python", producer=_PRODUCER
            )
            self._emit("FAIL", {"errorMessage": facet})

    def _emit(self, state: str, facets: dict[str, Any]) -> None:
        from openlineage.client.event_v2 import InputDataset, Job, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import job_type_job

        kind = job_type_job.JobTypeJobFacet(
            processingType="BATCH", integration="SOFTSHARD", jobType="JOB", producer=_PRODUCER
        )
        namespace = os.environ.get("OPENLINEAGE_NAMESPACE", "softshard")
        event = RunEvent(
            eventType=RunState[state],
            eventTime=datetime.now(UTC).isoformat(),
            run=Run(runId=self._run, facets={**self._parent, **facets}),
            job=Job(namespace=namespace, name=self._job, facets={"jobType": kind}),
            inputs=[InputDataset(namespace=space, name=name) for space, name in self._inputs],
            outputs=[self._output_dataset()],
            producer=_PRODUCER,
        )
        try:
            self._client.emit(event)
        except (OSError, ValueError, RuntimeError) as error:
            if not self._failed:
                self._failed = True
                self._on_failure(without_credentials(f"OpenLineage: {state} was not sent ({error}); the run continues"))

    def _output_dataset(self) -> Any:
        from openlineage.client.event_v2 import OutputDataset
        from openlineage.client.facet_v2 import dataset_version_dataset, output_statistics_output_dataset

        namespace, name = self._output
        if self._targets is None:
            return OutputDataset(namespace=namespace, name=name)
        version = dataset_version_dataset.DatasetVersionDatasetFacet(
            datasetVersion=str(self._targets["manifest"]), producer=_PRODUCER
        )
        written = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            rowCount=_int_or_none(self._targets.get("sequences")),
            size=_int_or_none(self._targets.get("bytes")),
            fileCount=_int_or_none(self._targets.get("parts")),
            producer=_PRODUCER,
        )
        return OutputDataset(
            namespace=namespace,
            name=name,
            facets={"version": version},
            outputFacets={"outputStatistics": written},
        )


def _int_or_none(value: EventValue) -> int | None:
    return value if isinstance(value, int) else None


def _client() -> OpenLineageClient:
    try:
        from openlineage.client import OpenLineageClient
    except ImportError as error:
        remedy = "set OPENLINEAGE_DISABLED=true"
        raise ExtraMissing(
            what="OpenLineage is configured", package="openlineage-python", extra="lineage", remedy=remedy
        ) from error
    try:
        return OpenLineageClient()
    except (ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        problem = f"its transport cannot be set up: {error}; correct it, or set OPENLINEAGE_DISABLED=true"
        raise JobInvalid(file="OpenLineage", place="", problem=without_credentials(problem)) from error


def _parent() -> dict[str, Any]:
    from openlineage.client.facet_v2 import parent_run

    text = os.environ.get("OPENLINEAGE_PARENT_ID")
    if not text:
        return {}
    try:
        namespace, name, run = text.split("/")
        job = parent_run.Job(namespace=namespace, name=name)
        return {"parent": parent_run.ParentRunFacet(run=parent_run.Run(runId=run), job=job, producer=_PRODUCER)}
    except ValueError as error:
        problem = f"{text!r} is not of the form namespace/name/run, with a UUID as run"
        raise JobInvalid(file="OpenLineage", place="OPENLINEAGE_PARENT_ID", problem=problem) from error
