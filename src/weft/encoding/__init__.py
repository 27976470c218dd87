"""From samples to the tensors that a model reads, in training and afterwards.

samples.py    samples of one format, from files or a task
render.py     text and conversations to tokens, and which tokens are in the loss
conversation.py  a record of chat data in one form; template.py renders it, leaves.py checks that
              all of it was rendered, turns.py finds the assistant's turns in the text
borders.py    tokens with a border between a prompt and its answer
labels.py     texts with classes or scores to tokens
rows.py       encoded samples, and counts of what went wrong
collate.py    encoded samples to a padded batch
tokenizer.py  a model's tokenizer, its limits, and the tokens that end generation
"""
