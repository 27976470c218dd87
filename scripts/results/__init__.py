"""Results on real models and data: experiments with `weft compare`, and pages generated from their
records.

`python -m scripts.results run sst2 --data DATA` runs one experiment and writes its record to
docs/results/records. `make results` regenerates docs/results/ from the records, in seconds.
"""
