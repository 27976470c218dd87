"""Subclasses made at run time: a module gets one in the place of its class, and gives it back
later.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

OWN = "_weft_base"  # on such a subclass: the class that the module had


def _state(module: nn.Module) -> Any:
    """The attributes that a copy gets: recurrent layers leave out some of theirs."""
    own = getattr(module, "__getstate__", None)  # every object has it from Python 3.11 on
    return module.__dict__ if own is None else own()


class Subclasses:
    """One kind of subclass: `members` are what it has in the place of its base's, `forward` for
    example.

    A copy or a pickle of a module names `blank`, a function of a file, and the module's own class.
    """

    def __init__(self, prefix: str, blank: Callable[[type[nn.Module]], nn.Module], **members: Any):
        self._prefix, self._blank, self._members = prefix, blank, members
        self._made: dict[type[nn.Module], type[nn.Module]] = {}

    def of(self, base: type[nn.Module]) -> type[nn.Module]:
        """Returns the subclass of a class of modules, always the same one."""
        if base not in self._made:
            body = {
                **self._members,
                OWN: base,
                "__reduce_ex__": lambda module, _: (self._blank, (base,), _state(module)),
                "__module__": base.__module__,
                "__doc__": base.__doc__,
            }
            self._made[base] = types.new_class(
                f"{self._prefix}{base.__name__}",
                (base,),
                exec_body=lambda names: names.update(body),
            )
        return self._made[base]

    def blank(self, base: type[nn.Module]) -> nn.Module:
        """Returns a module of the subclass, without any attribute."""
        cls = self.of(base)
        return cls.__new__(cls)
