"""The corpus stage: sources to tokenised sequences."""
