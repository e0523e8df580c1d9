"""Side-by-side measurements, one program each: `python -m bench.vector_filter | pipeline | generation | stream`.

Every figure is measured in the run that prints it. Output is JSON lines on stdout; progress goes to stderr.
"""
