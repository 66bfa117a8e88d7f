"""Pipelines before anything runs: how a chain is cut into stages, what each rank does when, what it costs."""
