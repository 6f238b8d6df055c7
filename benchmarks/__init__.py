"""Measurements of softshard, one package for each question: `python -m benchmarks.sketch --quick`."""
