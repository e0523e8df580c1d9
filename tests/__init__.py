"""The suite. A package of its own, so that one named `tests` of some installed project does not stand in its place."""
