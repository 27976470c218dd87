"""What Weft's methods cost, beside `peft`, the plain dense implementation and the physical limit.

    python -m benchmarks quick            all rows of the table, in less than 15 minutes on two cores (make bench)
    python -m benchmarks full             every shape, one factor varied at a time (make bench-full)
    python -m benchmarks quick --cases dora-1024,vera-4096
    python -m benchmarks table FILE       a results file printed again; --readme for the short form

Choices that make it fair, and harder:
  - the optimiser steps in every round, so whatever a method derives from its numbers is stale in the next forward;
  - every contender's gradient flows back to the embedding's output, as the limit's does (Setup.flow);
  - contenders share the memory of the frozen weights; a merged model has its own, as the base beside it has;
  - the peers' column has the same contender below the line as Weft's.

A case builds all its contenders in one process, checks that each has its adapter in force and that
those of one equation compute the same, and only then takes times, strictly in turns (A B C A B C
...).

setup.py      models from configurations, with random weights, and their batches
contenders.py peers.py    what is compared
timing.py memory.py       how it is measured
kinds/        one file a kind of measurement
cases.py      which cases there are, and what each has to show
store.py report.py machine.py    results on disk and on paper
"""
