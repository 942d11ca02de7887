"""Clients: the thin Flower app, and the trainers that do the work."""
