"""Models and held-out writing to metrics, samples and a report. Nothing heavy is imported here."""
