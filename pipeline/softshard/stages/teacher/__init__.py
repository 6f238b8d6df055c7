"""The teacher stage: a corpus to the adapters of the style teacher."""
