"""Adapter files: reading, writing, layouts, integrity."""
