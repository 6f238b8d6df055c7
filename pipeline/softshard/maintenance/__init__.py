"""Maintenance of an output: verify, rescore, repair, gc."""
