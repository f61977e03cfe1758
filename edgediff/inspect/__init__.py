"""Counts, comparisons with the papers' tables, and the placement lint."""
