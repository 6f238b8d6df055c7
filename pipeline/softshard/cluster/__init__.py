"""A Dask cluster: a queue of tasks, retries, signals, and what runs on a worker."""
