"""Plain records: canonical JSON, digests, long lists on disk, seeds."""
