"""Batches to an adapter: the loss, the steps, retention, checkpoints, and the record of what was trained."""
