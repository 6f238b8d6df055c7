"""The targets stage: sequences and the style teacher to parts and their manifest."""
