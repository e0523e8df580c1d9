"""A chaos harness: real jobs on several Ray nodes of this machine, SIGKILLs from a seed, and what became of the work.

`python -m tests.faults.chaos --help`; `make chaos` runs the whole of it.
"""
