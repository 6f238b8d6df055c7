"""Sketches to Parquet parts, receipts and a manifest, and back."""
