"""Documents to sequences: read, screened, split, tokenised, cut into windows, written as Parquet.

sources ──► screen ──► tokenizer ──► windows ──► slices, documents ──► manifest
"""
