"""Arguments that name a job by its file or by its output, alike.

In: what the user gave. Out: the job, or its output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softshard.config import Job

__all__ = ["job_named", "output_named"]


def job_named(argument: str) -> Job:
    """The job of a job file, or the one that last ran in an output; its output is then where the argument says.

    Raises:
        JobInvalid: there is no such file, or it is not a valid job; its sources and models must exist.
    """
    from softshard.config.job_file import load_job

    if "://" not in argument and not Path(argument).is_dir():
        return load_job(argument)
    from softshard.output.workspace import saved_job
    from softshard.storage import open_store

    job = saved_job(open_store(argument), check_paths=True)
    return job if _is_same_place(job.out, argument) else job.model_copy(update={"out": argument})


def output_named(argument: str) -> str:
    """The output folder: the argument itself, or that of the job whose file it names. Raises JobInvalid."""
    if "://" in argument or not Path(argument).is_file():
        return argument
    from softshard.config.job_file import load_job

    return load_job(argument, check_paths=False).out


def _is_same_place(out: str, argument: str) -> bool:
    if "://" in out or "://" in argument:
        return out.rstrip("/") == argument.rstrip("/")
    return Path(out).resolve() == Path(argument).resolve()
