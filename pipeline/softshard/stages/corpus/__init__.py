"""The corpus stage: reads, screens and tokenises the documents."""
