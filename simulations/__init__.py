"""Simulations: the server app, planning, and the command line."""
