"""From samples to the tensors that a model reads, in training and afterwards.

samples.py    samples of one format, from files or a task
render.py     text and conversations to tokens, and which tokens are in the loss
labels.py     texts with classes or scores to tokens
rows.py       encoded samples, and counts of what went wrong
collate.py    encoded samples to a padded batch
tokenizer.py  a model's tokenizer, its limits, and the tokens that end generation
"""
