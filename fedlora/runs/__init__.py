"""Run folder, export and report."""
