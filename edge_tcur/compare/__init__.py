"""Comparison of methods on the same tasks: a grid of runs that resumes, a table and a plot."""
