"""What a model does with a finished adapter: scores, text, and answers for a judge.

pretrained.py  a transformers model by name, without weights or loaded for an adapter
opened.py      a model with its adapter and its tokenizer
evaluate.py    the scores of a task (`weft eval`)
generate.py    text from prompts (`weft generate`, and evaluation in `weft train`)
two_turns.py   answers to questions of one or two turns (`weft judge`)
harness.py     scores by lm-evaluation-harness (`weft eval --lm-eval`)
"""
