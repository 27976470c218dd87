"""What one run of `weft compare` trains and measures.

base.py       what a run needs of a task
open_task.py  opens a task for one model
labelled.py   a task with classes or scores
generated.py  a task whose answers are text
loop.py       the training loop, and scores of a split
"""
