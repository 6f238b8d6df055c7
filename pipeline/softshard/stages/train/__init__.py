"""The train stage: trains the adapter and the baseline on the targets."""
