"""Trainings of small students on texts by people: what `benchmarks.dft` and `benchmarks.online` share."""
