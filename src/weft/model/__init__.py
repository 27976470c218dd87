"""Adapters in a model: base layers, structure, attaching, the active adapter, merging. No method is
known here by name.
"""
