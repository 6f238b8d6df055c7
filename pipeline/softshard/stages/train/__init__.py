"""The train stage: target sets to adapters, the baseline among them."""
