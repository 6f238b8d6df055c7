"""The output folder of a job: its owner, its lease, its status, and its stored sequences."""
