"""Runnable jobs. `python -m jobs.<name>` and `curate <name>` are the same; all are Hydra applications over conf/."""
