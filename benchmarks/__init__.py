"""Measurements of imprompt and of other implementations of the same work; see README.md."""
