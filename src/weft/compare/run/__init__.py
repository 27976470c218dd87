"""Executes the runs of a comparison and stores their results."""
