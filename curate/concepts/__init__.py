"""Concepts: directions of the residual stream, where they come from and their files. No model, no cluster."""
