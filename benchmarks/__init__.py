"""Benchmarks: one runner, one registry of cases, one script per headline. Not part of the installed package."""
