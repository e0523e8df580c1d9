"""Connectors: files of any supported format, anywhere fsspec reaches, as units and rows. Knows no model and no Ray."""
