"""Benchmarks: every arm in one run, every number measured in it."""
