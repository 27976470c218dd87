"""Turns finished runs into rows, statistics, tables, plots and files."""
