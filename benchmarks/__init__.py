"""What Weft's methods cost, beside `peft`, the plain dense implementation and the physical limit.

    python -m benchmarks quick            all rows of the table, in 25 minutes on two cores (make bench)
    python -m benchmarks full             every shape, one factor varied at a time (make bench-full)
    python -m benchmarks gpu              one GPU, within 20 minutes (make bench-gpu)
    python -m benchmarks quick --cases overhead-64,dora-1024
    python -m benchmarks table FILE       a results file printed again; --readme for the short form

Choices that make it fair, and harder:
  - the optimiser steps in every round, so whatever a method derives from its numbers is stale in the next forward;
  - every contender's gradient flows back to the embedding's output, as the limit's does (Setup.flow);
  - contenders share the memory of the frozen weights; a merged model has its own, as the base beside it has;
  - the peers' column has the same contender below the line as Weft's.

A case builds all its contenders in one process, checks that each has its adapter in force and that
those of one equation compute the same, and only then takes times, strictly in turns (A B C A B C
...).

setup.py shared.py   models from configurations, with random weights, and their batches; real ones
contenders.py factory.py peers.py floor.py    what is compared
timing.py memory.py       how it is measured
kinds/        one file per kind of measurement
case.py cases.py small_work.py gpu.py    the cases, and the goals of their rows
internals.py  every name of Weft used here that is not public
store.py report.py machine.py    results on disk and on paper
"""
