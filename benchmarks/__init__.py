"""Where the tables of the README come from: `python benchmarks/run_all.py`."""
