"""Every error that Weft raises on purpose. Each says what came, what exists, and what to type."""


class WeftError(Exception):
    """The root of all errors that Weft raises on purpose."""


class ConfigError(WeftError, ValueError):
    """A configuration holds a value that cannot be meant."""


class TargetError(WeftError, ValueError):
    """The targets of a configuration do not fit the model."""


class CheckpointError(WeftError):
    """A file and the model (or the file and itself) disagree."""


class MergeError(WeftError, RuntimeError):
    """A merge or unmerge that cannot be done, or that changed the output."""


class AuditError(WeftError, RuntimeError):
    """A declared tensor did not train, or the frozen base moved."""


class UnsupportedError(WeftError):
    """The request is valid, but Weft does not support it."""
