"""Prompt methods: trained keys and values, and virtual tokens. Nothing here is a change of weights."""

from .injection import InjectionPoint, injection_point
from .install import answering, install, uninstall, virtual_positions
from .places import PromptHost, find_places, hosts_of

__all__ = [
    "InjectionPoint",
    "PromptHost",
    "answering",
    "find_places",
    "hosts_of",
    "injection_point",
    "install",
    "uninstall",
    "virtual_positions",
]
