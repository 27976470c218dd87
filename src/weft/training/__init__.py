"""Training: the audit and the loop."""
