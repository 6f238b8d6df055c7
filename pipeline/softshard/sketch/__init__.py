"""The mathematics of a target: logits to sketches, sketches to entries. Numpy and torch in and out, no files."""
