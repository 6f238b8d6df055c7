"""The teacher stage: trains the adapters of the style teacher on the corpus."""
