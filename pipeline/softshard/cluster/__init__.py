"""The Dask cluster: a task queue, the retry policy, signals, and the worker's side."""
