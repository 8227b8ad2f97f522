"""Measuring what an adapter does: sets, protocols, judges, metrics, and runs that can be stopped
and gone on with.
"""
