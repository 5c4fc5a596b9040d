"""Comparing runs: experiment files, summaries, statistics, figures and the report's page."""
