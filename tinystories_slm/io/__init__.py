"""Atomic files and directories, locks, and formatting of units."""
