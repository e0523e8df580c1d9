"""Causal language models: load them, read their activations, cut batches, generate. Knows no storage but paths and
URLs, no scorer and no cluster."""
