"""The only room that imports ray: sessions, streaming of units, actor pools, commits and resume."""
