"""Cost and fidelity of targets, measured on a few sequences, and the search for the threshold of a budget."""
