"""Families of base models: a row each, found by `base.family_of`."""
