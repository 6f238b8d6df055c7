"""The stages of a job, in their order, and the plan and the export of one."""
