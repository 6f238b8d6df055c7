"""Parts to an adapter: streamed in a seeded order, collated, a sparse KL in chunks, LoRA, checkpoints.

parts ──► rows ──► order ──► batches ──► decoder, loss ──► steps ──► adapter
"""
