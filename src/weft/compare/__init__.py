"""Compares methods on one task.

request.py  what the user asked for, checked before the model is loaded
plan/       which runs a comparison needs: pure functions of the request and the finished runs
run/        where runs are stored (study), who executes them (scheduler, worker), what they cost
report/     the results: statistics, table, JSON and CSV, plots, the long report, papers' tables
compare.py  one comparison from the request to the rows
files.py    atomic writes
"""
