"""Adapters of a frozen model, of all kinds."""
