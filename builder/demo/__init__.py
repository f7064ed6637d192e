"""Tiny Wan models that have learned a toy world, so that the worker makes films worth looking at on a laptop."""
