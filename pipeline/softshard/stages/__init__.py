"""The stages of a job, one room each, and `job`, which runs them in order."""
