"""Directional derivatives of the rows' losses along test vectors: three backends that agree and differ in cost."""
