"""Clients that come back, for benchmarks: a process of its own runs ``python -m bench.clients``."""
