"""Sweeps: grids of runs in one process, hyper-parameters chosen on dev rows, one table; and the files of our own."""
