"""Filters of raw stories: cleaning rules, duplicates and leaks, and the record of what they drop."""
