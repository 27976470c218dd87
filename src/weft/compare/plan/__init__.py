"""Which runs a comparison needs: pure functions, without files, processes or models."""
