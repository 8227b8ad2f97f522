"""Measurements of imprompt beside other implementations of the same work: see README.md."""
