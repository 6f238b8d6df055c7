"""Parts to batches: rows in a seeded order, filtered, mixed, blended, and sharded over ranks.

parts ──► rows ──► order ──► batches ──► ranks
"""
