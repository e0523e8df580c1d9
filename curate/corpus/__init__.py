"""Rows of a corpus: examples, units of work, coverage, recipes. Knows no model, no storage and no cluster."""
