"""The targets stage: scores the corpus and writes the parts."""
