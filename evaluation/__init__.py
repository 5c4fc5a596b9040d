"""Scoring: predictions, benchmarks, corruptions, metrics, results files, tables and plots."""
