"""Sequences to sketches: the engines, and the teacher that is adapted to the corpus."""
