"""Reports of runs: tables for the terminal, plots, ``summary.md``, the HTML page, and the adapter's model card."""
