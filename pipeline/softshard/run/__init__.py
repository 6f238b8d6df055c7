"""Plan, Dask and the stages of a job: what ties the other packages together."""
