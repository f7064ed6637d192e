"""Stores finished files: in the worker's bucket, in a job's own bucket, or in a local folder."""
