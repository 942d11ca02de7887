"""Benchmarks: each a command that prints what it measured, with the machine that it ran on."""
