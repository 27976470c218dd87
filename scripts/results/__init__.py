"""Measured results on real models and data: experiments that run through `weft compare`, and pages
made of their records.

`python -m scripts.results run sst2 --data DATA` runs one experiment and puts its record into
docs/results/records; `make results` writes docs/results/ anew from the records, in seconds.
"""
