"""The mathematics of a target: from logits to sketches, and from sketches to entries. Numpy and torch, no files."""
