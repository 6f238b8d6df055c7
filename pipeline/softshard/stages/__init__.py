"""The stages of a job, in their order, and the plan and the export of one."""

STAGES = ("corpus", "teacher", "targets", "train", "evaluate")
"""Names of the stages, which are also the names of their commands."""
