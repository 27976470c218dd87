"""Virtual tokens: they enter a model with its input, are seen by attention, and are removed before
anything reads the output.

Only the states of real tokens leave a decoder, so heads, losses and poolers see the usual shapes.
With a key-value cache the virtual tokens enter with the first tokens and stay in the cache; the
cache is marked with the adapter, so continuing it under another one is an error. In an encoder they
follow the embedding module's output, at the end, until the last block has run: a norm or a pooler
after it reads real tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError, WeftError
from ..active import Active, ActiveAdapters, PerRow, recomputed
from ..carried import layers_of
from .decoder import DecoderInputs, plain_mask, vectors
from .forward import arguments_by_name, parameters_of
from .injection import InjectionPoint
from .layout import TokenLayout, take

_MARK = "_weft_virtual_tokens"  # on a key-value cache: (adapter, layout)
_CACHES = ("cache", "past_key_values")
_STATES = ("last_hidden_state", "hidden_states")
_MEMORY = 64  # forwards whose backward may still run again
_NO_TOKENS = TokenLayout(0, 0, 0, 0, torch.device("cpu"))


class VirtualTokenHooks:
    """The hooks by which virtual tokens enter and leave one model. `configs` are the prompts
    attached to it, by adapter name.
    """

    def __init__(self, point: InjectionPoint, active: ActiveAdapters) -> None:
        self.base, self.decoder, self._active = point.module, point.decoder, active
        self.outer = tuple(point.outer)
        self.hooked = [self.base]  # modules that must stay in the model
        self.configs: dict[str, Any] = {}
        self._names = parameters_of(type(self.base))
        self._reset()
        self._hooks = [
            self.base.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.base.register_forward_hook(self.leave),
        ]
        self.generator = next(
            (m for m in reversed(self.outer) if callable(getattr(m, "generate", None))), None
        )
        self.next_token = self.decoder and _predicts_next_token(self.outer)
        self._inputs = DecoderInputs.of(self.base) if self.decoder else None
        if self.decoder:
            self._watch_decoder()
        else:
            self._watch_encoder(point)

    def _watch_decoder(self) -> None:
        if self.next_token:
            self._hooks += [
                m.register_forward_pre_hook(
                    partial(self.see_labels, parameters_of(type(m))), with_kwargs=True
                )
                for m in self.outer
            ]
        if self.generator is not None:
            self._replaced = self.generator.__dict__.get("generate")
            self.generator.__dict__["generate"] = partial(_generate, self, self._replaced)

    def _watch_encoder(self, point: InjectionPoint) -> None:
        embeddings: nn.Module = self.base._modules["embeddings"]  # type: ignore[assignment]
        self._hooks.append(embeddings.register_forward_hook(self.append_tokens))
        self.hooked.append(embeddings)
        if point.last is not None:
            self._hooks.append(point.last.register_forward_hook(self.end_blocks))
            self._hooks += [
                m.register_forward_pre_hook(self.drop_tokens, with_kwargs=True)
                for m in point.behind
            ]

    def _reset(self) -> None:
        self.layout: TokenLayout | None = None
        self.labels: Tensor | None = None
        self.outside_labels: Tensor | None = None  # labels that the forward does not receive
        self.behind_blocks = False
        self.prompt_length: int | None = None  # set while `generate` runs
        self._layouts: deque[tuple[int, TokenLayout]] = deque(maxlen=_MEMORY)

    def __getstate__(self) -> dict[str, Any]:
        passing = dict.fromkeys(("layout", "labels", "outside_labels", "prompt_length"))
        return {**self.__dict__, **passing, "_layouts": deque(maxlen=_MEMORY)}

    def add(self, name: str, config: Any) -> None:
        """Adds the prompt of an adapter."""
        self.configs[name] = config

    def drop(self, name: str) -> None:
        """Removes the prompt of an adapter, if there is one."""
        self.configs.pop(name, None)

    def close(self) -> None:
        """Removes all hooks."""
        for hook in self._hooks:
            hook.remove()
        if (
            self.decoder
            and self.generator is not None
            and isinstance(self.generator.__dict__.get("generate"), partial)
        ):
            del self.generator.__dict__["generate"]
            if self._replaced is not None:
                self.generator.__dict__["generate"] = self._replaced

    def see_labels(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Pre-hook of the modules around the decoder: the first label ends the prompt."""
        labels = arguments_by_name(names, args, kwargs).get("labels")
        if isinstance(labels, Tensor) or module is self.outer[0]:
            self.labels = labels if isinstance(labels, Tensor) else None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the base model: adds the virtual tokens to its input, or shifts positions for
        a prefix. Raises WeftError if the cache was filled under another adapter.
        """
        labels = self.labels if self.labels is not None else self.outside_labels
        self.labels, self.layout, self.behind_blocks = None, None, False
        active, given = self._current(), arguments_by_name(self._names, args, kwargs)
        config = self.configs.get(active) if isinstance(active, str) else None
        virtual = config is not None and config.where != "attention"
        cache = next((given[key] for key in _CACHES if given.get(key) is not None), None)
        past = int(cache.get_seq_length()) if cache is not None else 0
        filled_by, layout = getattr(cache, _MARK, (None, _NO_TOKENS))
        if past and filled_by != (active if virtual else None):
            raise WeftError(
                f"this key-value cache was filled under {filled_by or 'no virtual tokens'!r}, and "
                f"now {active!r} is active. Begin a new cache."
            )
        if not virtual:
            shifted = self._shifted_positions(active, given, past)
            return None if shifted is None else ((), {**given, "position_ids": shifted})
        if self._inputs is None:
            return (), self._enter_encoder(config, given)
        if past:
            return (), self._inputs.resume(config, given, layout)
        given, layout = self._inputs.begin(
            config, self._embedded(str(active)), given, labels, self.prompt_length
        )
        self._begin(layout)
        return (), given

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook of the base model: its output for real tokens only."""
        layout, self.layout = self.layout, None
        if layout is None:
            return None
        if isinstance(output, tuple):
            return tuple(
                _stripped(part, layout)
                if i == 0 or isinstance(part, tuple)
                else self._marked(part, layout)
                for i, part in enumerate(output)
            )
        for key in _STATES:
            if key in output.keys() and output[key] is not None:  # noqa: SIM118 - of a ModelOutput, whose get() warns
                output[key] = _stripped(output[key], layout)
        self._marked(next((output[key] for key in _CACHES if key in output.keys()), None), layout)  # noqa: SIM118
        return output

    def append_tokens(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook of an encoder's embedding module: appends the virtual tokens. Raises
        UnsupportedError if its output is not one tensor [rows, tokens, width].
        """
        if self.layout is None:
            return None
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise UnsupportedError(
                f"{type(module).__name__} gives more than one tensor [rows, tokens, width], so "
                "virtual tokens cannot follow it. Keys and values (weft.Prefix) have no such limit."
            )
        active = str(self._current())
        config, (rows, length, _) = self.configs[active], output.shape
        self._begin(
            TokenLayout(0, config.l_p + config.l_i, length, length, output.device, answers=False)
        )
        added = vectors(config, self._embedded(active), output)
        return torch.cat([output, *(t.to(output.dtype).expand(rows, -1, -1) for t in added)], dim=1)

    def end_blocks(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of an encoder's last block."""
        self.behind_blocks = True

    def drop_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the modules after an encoder's blocks: real tokens only, since a pooler would
        take the mean of all.
        """
        layout = self.layout
        if layout is None or not self.behind_blocks:
            return None

        def real(x: Any) -> Any:
            whole = isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == layout.total
            return x[:, : layout.length] if whole else x

        return tuple(map(real, args)), {key: real(value) for key, value in kwargs.items()}

    def replace_states(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pre-hook of a block: the states trained for it, at the virtual positions. Raises
        WeftError if the model has changed the length of the sequence.
        """
        active = self._current()
        if not isinstance(active, str) or active not in layers_of(module):
            return None
        layout = self._current_layout()
        if layout is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] != layout.total:
            raise WeftError(
                f"a block received {x.shape[1]} positions, and {layout.total} with virtual tokens "
                "entered the model: the model has changed the sequence, so the virtual positions "
                "are unknown."
            )
        layer: Any = layers_of(module)[active]
        states = torch.cat([getattr(layer, name) for name in layer.names]).to(x.dtype)
        columns = layout.virtual()[..., None].expand(x.shape[0], -1, x.shape[2])
        x = x.scatter(1, columns, states[None].expand(x.shape[0], -1, -1))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _current(self) -> Active:
        """The adapter, or the adapters per row, that the caller uses."""
        return self._active.current(self.base.training)

    def _enter_encoder(self, config: Any, given: dict[str, Any]) -> dict[str, Any]:
        mask = plain_mask(given.get("attention_mask"))
        if mask is not None:
            more = mask.new_ones(mask.shape[0], config.l_p + config.l_i)
            given["attention_mask"] = torch.cat([mask, more], dim=1)
        self.layout = _NO_TOKENS  # until the embedding module's output gives the length
        return given

    def _embedded(self, active: str) -> Any:
        """The layer with the trained embeddings, or None if every block replaces them."""
        return layers_of(self.base)[active] if self.configs[active].where == "embeddings" else None

    def _shifted_positions(self, active: Any, given: Mapping[str, Any], past: int) -> Any:
        if self._inputs is None:
            return None
        names = active.names if isinstance(active, PerRow) else [active]
        shifts = [getattr(self.configs.get(str(name)), "shift", 0) for name in names]
        return self._inputs.shifted_positions(shifts, given, past)

    def _begin(self, layout: TokenLayout) -> None:
        self.layout = layout
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._layouts.append((torch._C._autograd._get_sequence_nr(), layout))

    def _current_layout(self) -> TokenLayout | None:
        """The layout of the forward that runs, or that backward runs again."""
        if self.layout is not None or torch.compiler.is_compiling():
            return self.layout
        # Transformers before 5.24 recomputes a block alone, with its hooks.
        started = recomputed()
        if started is None:
            return None
        found = next((layout for n, layout in reversed(self._layouts) if n <= started), None)
        if found is None:
            raise WeftError(
                "backward recomputes a forward that ran too many forwards ago. Call backward() "
                "sooner."
            )
        return found

    def _marked(self, cache: Any, layout: TokenLayout) -> Any:
        if hasattr(cache, "get_seq_length"):
            setattr(cache, _MARK, (self._current(), layout))
        return cache


def _stripped(part: Any, layout: TokenLayout) -> Any:
    """States [rows, total, width] without those of virtual tokens."""
    if isinstance(part, tuple):
        return tuple(_stripped(p, layout) for p in part)
    if not isinstance(part, Tensor) or part.dim() != 3:
        return part
    if not layout.answers and part.shape[1] == layout.length:
        return part  # read behind an encoder's blocks
    if part.shape[1] != layout.total:
        raise WeftError(
            f"the model returned {part.shape[1]} positions, and {layout.total} with virtual "
            "tokens entered, so real tokens cannot be told apart. Please report this architecture."
        )
    return take(part, layout.outputs().expand(part.shape[0], -1))


def _generate(hooks: VirtualTokenHooks, replaced: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, with the length of the prompt known while it runs."""
    cls: Any = type(hooks.generator)
    own = replaced if replaced is not None else partial(cls.generate, hooks.generator)
    candidates = (
        kwargs.get("inputs_embeds"),
        *args[:1],
        kwargs.get("inputs"),
        kwargs.get("input_ids"),
    )
    prompt = next((t for t in candidates if isinstance(t, Tensor)), None)
    cache: Any = next((kwargs[key] for key in _CACHES if kwargs.get(key) is not None), None)
    if getattr(cache, _MARK, (None,))[0] is not None and cache.get_seq_length():
        raise UnsupportedError(
            "this key-value cache holds virtual tokens, which `generate` would count as the "
            "text's, and so leave out as many of the new ones. Give it the whole text, and no "
            "cache."
        )
    hooks.prompt_length = None if prompt is None else int(prompt.shape[1])
    try:
        return own(*args, **kwargs)
    finally:
        hooks.prompt_length = None


def _predicts_next_token(outer: Sequence[nn.Module]) -> bool:
    """True if the labels are the next tokens. A transformers head that cannot generate labels every
    token, or the row.
    """
    known = [m.can_generate() for m in outer if callable(getattr(m, "can_generate", None))]  # type: ignore[operator]
    return any(known) or not known
