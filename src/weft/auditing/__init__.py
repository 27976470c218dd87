"""The audit: whether every declared tensor trained, and whether the base is unchanged.

snapshot.py     copies and digests of a model's tensors, and the gradients seen since
audit.py        the comparison of two snapshots
base_digest.py  digests of the base's bits

`weft.snapshot` and `weft.audit` are the public names.
"""
