"""Virtual tokens: they enter a model with its input, are seen by attention, and are gone before
anything reads the output.

A decoder is given `inputs_embeds` with the trained vectors in their places, a wider attention mask,
and position ids that count them; of what it returns only the states of real tokens are passed on,
so heads, losses and poolers see the shape that they know. With a key-value cache they enter with
the first tokens and are in the cache from then on; what was entered is noted on the cache, so that
continuing it under another adapter is an error. In an encoder they stand behind the embedding
module's output, at the end, until the last block is through: a norm or a pooler behind it reads
real tokens.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, WeftError
from .active import ActiveAdapters, PerRow, recomputed
from .frame import Frame, take
from .layer import layers_of

_MARK = "_weft_virtual_tokens"  # what a key-value cache was filled with
_CACHES = ("cache", "past_key_values")
_STATES = ("last_hidden_state", "hidden_states")
_MEMORY = 64  # forwards whose backward may still run again


@dataclass(frozen=True, eq=False)
class Entry:
    """Where virtual tokens enter: the module, and whether it is a decoder (by `inputs_embeds`) or
    an encoder. `above`: the modules around it, from the root. Of an encoder, `last` ends the
    blocks, and `behind` are the module's children after it.
    """

    name: str
    module: nn.Module
    decoder: bool
    above: Sequence[nn.Module] = ()
    last: nn.Module | None = None
    behind: Sequence[nn.Module] = ()


class Gate:
    """Where virtual tokens enter one model. `rules` are the prompts attached to it, by adapter
    name.
    """

    def __init__(self, entry: Entry, switch: ActiveAdapters) -> None:
        self.base, self.decoder, self.switch = entry.module, entry.decoder, switch
        self.above, base = tuple(entry.above), entry.module
        self.rules: dict[str, Any] = {}
        self._names = parameters_of(type(base))
        self._counts_tokens = "cumsum" in _code_names(
            type(base)
        )  # OPT's position ids count the mask's tokens
        self._limit = _learned_positions(base) if self.decoder else None
        self._none = Frame(0, 0, 0, 0, torch.device("cpu"))
        self._forget()
        self._hooks = [
            base.register_forward_pre_hook(self.enter, with_kwargs=True),
            base.register_forward_hook(self.leave),
        ]
        self.speaker = next(
            (m for m in reversed(self.above) if callable(getattr(m, "generate", None))), None
        )
        if not self.decoder:
            self._watch_encoder(entry)
            return
        self.next_token = _next_token(self.above)
        if self.next_token:
            self._hooks += [
                m.register_forward_pre_hook(
                    partial(self.see_labels, parameters_of(type(m))), with_kwargs=True
                )
                for m in self.above
            ]
        if self.speaker is not None:
            self._replaced = self.speaker.__dict__.get("generate")
            self.speaker.__dict__["generate"] = partial(_generate, self, self._replaced)

    def _watch_encoder(self, entry: Entry) -> None:
        embeddings: nn.Module = self.base._modules["embeddings"]  # type: ignore[assignment]
        self._hooks.append(embeddings.register_forward_hook(self.append))
        if entry.last is not None:
            self._hooks.append(entry.last.register_forward_hook(self.pass_blocks))
            self._hooks += [
                m.register_forward_pre_hook(self.read_real, with_kwargs=True) for m in entry.behind
            ]

    def _forget(self) -> None:
        self.frame: Frame | None = None
        self.labels: Tensor | None = None
        self.told: Tensor | None = None  # labels that the forward itself is not given
        self.through = False  # the blocks have run, and what comes behind them runs now
        self.prompt: int | None = None  # columns of the prompt, while `generate` runs
        self._frames: deque[tuple[int, Frame]] = deque(maxlen=_MEMORY)

    def __getstate__(self) -> dict[str, Any]:
        passing = dict.fromkeys(("frame", "labels", "told", "prompt"))
        return {**self.__dict__, **passing, "_frames": deque(maxlen=_MEMORY)}

    def add(self, name: str, rule: Any) -> None:
        self.rules[name] = rule

    def drop(self, name: str) -> None:
        self.rules.pop(name, None)

    def close(self) -> None:
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()
        if (
            self.decoder
            and self.speaker is not None
            and isinstance(self.speaker.__dict__.get("generate"), partial)
        ):
            del self.speaker.__dict__["generate"]
            if self._replaced is not None:
                self.speaker.__dict__["generate"] = self._replaced

    # Hooks

    def see_labels(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Before the whole model, and before each part around the entry: labels tell where the
        prompt ends.
        """
        labels = named(names, args, kwargs).get("labels")
        if isinstance(labels, Tensor) or module is self.above[0]:
            self.labels = labels if isinstance(labels, Tensor) else None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: put the virtual tokens into its input, or shift positions for a
        prefix.
        """
        labels, self.labels, self.frame, self.through = self.labels, None, None, False
        labels = labels if labels is not None else self.told
        active, given = self.switch.current(self.base.training), named(self._names, args, kwargs)
        rule = self.rules.get(active) if isinstance(active, str) else None
        virtual = rule is not None and rule.at != "attention"
        store = next((given[key] for key in _CACHES if given.get(key) is not None), None)
        past = int(store.get_seq_length()) if store is not None else 0
        filled_by, kept = getattr(store, _MARK, (None, self._none))
        if past and filled_by != (active if virtual else None):
            raise WeftError(
                f"this key-value cache was filled under {filled_by or 'no virtual tokens'!r}, and "
                "now "
                f"{active!r} is active. Begin a new cache."
            )
        if not virtual:
            shift = self._shift(active, given, past)
            return None if shift is None else ((), {**given, "position_ids": shift})
        if not self.decoder:
            return self._enter_encoder(rule, given)
        return (), self._continue(rule, given, kept) if past else self._begin(
            str(active), rule, given, labels
        )

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the model: real tokens only."""
        frame, self.frame = self.frame, None
        if frame is None:
            return None
        if isinstance(output, tuple):
            return tuple(
                self._stripped(part, frame)
                if i == 0 or isinstance(part, tuple)
                else self._marked(part, frame)
                for i, part in enumerate(output)
            )
        for key in _STATES:
            if key in output.keys() and output[key] is not None:  # noqa: SIM118 - of a ModelOutput, whose get() warns
                output[key] = self._stripped(output[key], frame)
        self._marked(next((output[key] for key in _CACHES if key in output.keys()), None), frame)  # noqa: SIM118
        return output

    def append(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After an encoder's embedding module: the virtual tokens, at the end."""
        if self.frame is None:
            return None
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise UnsupportedError(
                f"{type(module).__name__} gives more than one tensor [rows, tokens, width], so "
                "virtual "
                "tokens cannot stand behind it. Keys and values (weft.Prefix) need no such place."
            )
        rule: Any = self.rules[str(self.switch.current(self.base.training))]
        frame = Frame(
            0, rule.l_p + rule.l_i, output.shape[1], output.shape[1], output.device, answers=False
        )
        self._begun(frame)
        return torch.cat(
            [
                output,
                *(
                    t.to(output.dtype).expand(output.shape[0], -1, -1)
                    for t in self._vectors(rule, output)
                ),
            ],
            dim=1,
        )

    def pass_blocks(self, module: nn.Module, args: Any, output: Any) -> None:
        """After an encoder's last block."""
        self.through = True

    def read_real(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before what stands behind an encoder's blocks: real tokens only, or a pooler would take
        the mean of all.
        """
        frame = self.frame
        if frame is None or not self.through:
            return None

        def real(x: Any) -> Any:
            whole = isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] == frame.total
            return x[:, : frame.length] if whole else x

        return tuple(map(real, args)), {key: real(value) for key, value in kwargs.items()}

    def replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a block: the trained states of this block at the virtual positions."""
        active = self.switch.current(self.base.training)
        if not isinstance(active, str) or active not in layers_of(module):
            return None
        frame = self._frame_now()
        if frame is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] != frame.total:
            raise WeftError(
                f"a block received {x.shape[1]} positions, and {frame.total} with virtual tokens "
                "entered the "
                "model: it has changed the sequence on the way, so virtual positions cannot be "
                "told."
            )
        site: Any = layers_of(module)[active]
        states = torch.cat([getattr(site, name) for name in site.names]).to(x.dtype)
        columns = frame.virtual()[..., None].expand(x.shape[0], -1, x.shape[2])
        x = x.scatter(1, columns, states[None].expand(x.shape[0], -1, -1))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    # Steps

    def _begin(
        self, name: str, rule: Any, given: dict[str, Any], labels: Tensor | None
    ) -> dict[str, Any]:
        """A decoder's first tokens."""
        if given.get("token_type_ids") is not None:
            raise UnsupportedError(
                f"adapter {name!r} adds virtual tokens, and token_type_ids has no type for them. "
                "Leave "
                "it out."
            )
        mask, ids = _plain_mask(given.get("attention_mask")), given.pop("input_ids", None)
        x = given["inputs_embeds"] if ids is None else self.base.get_input_embeddings()(ids)  # type: ignore[operator]
        end, positions = self._end(rule, x.shape[1], mask, labels), given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() != 2:
            raise UnsupportedError(
                "virtual tokens need position ids as [rows, tokens], and these are "
                f"{positions.dim()}-"
                "dimensional. Keys and values (weft.Prefix) go with any."
            )
        if (
            mask is None
            and isinstance(positions, Tensor)
            and bool((positions.diff(dim=-1) != 1).any())
        ):
            raise UnsupportedError(
                "the position ids start anew within a row, which packs several sequences into it; "
                "those "
                "behind the first would not see the virtual tokens. Give each sequence a row of "
                "its own."
            )
        frame = Frame(rule.l_p, rule.l_i, end, x.shape[1], x.device)
        self._check_room(frame.total)
        given.pop("cache_position", None)
        given["inputs_embeds"] = frame.extend(x, *self._vectors(rule, x))
        if mask is not None:
            given["attention_mask"] = frame.mask(mask)
        if positions is not None:
            given["position_ids"] = frame.positions(positions, mask)
        self._begun(frame)
        return given

    def _continue(self, rule: Any, given: dict[str, Any], frame: Frame) -> dict[str, Any]:
        """Further tokens of a sequence in the cache, which holds the virtual ones."""
        tokens = _tokens(given)
        if rule.l_i and tokens is not None and tokens.shape[1] > 1:
            raise UnsupportedError(
                f"{tokens.shape[1]} tokens continue a cache that has virtual tokens behind the "
                "prompt, "
                "and they may belong to the prompt or to the answer. Give the prompt whole, then "
                "one "
                "token at a time (no prefill_chunk_size, no assistant)."
            )
        mask = _plain_mask(given.get("attention_mask"))
        given.pop("cache_position", None)
        if mask is not None:
            given["attention_mask"] = frame.of(mask.shape[1]).mask(mask)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + frame.before + frame.after
        return given

    def _enter_encoder(self, rule: Any, given: dict[str, Any]) -> Any:
        mask = _plain_mask(given.get("attention_mask"))
        if mask is not None:
            more = mask.new_ones(mask.shape[0], rule.l_p + rule.l_i)
            given["attention_mask"] = torch.cat([mask, more], dim=1)
        self.frame = self._none  # the embedding module's output tells the length
        return (), given

    def _end(
        self, rule: Any, length: int, mask: Tensor | None, labels: Tensor | None
    ) -> int | Tensor:
        """The column behind the prompt: as `generate` was given it, or before the first label, or
        behind the last token.
        """
        if not rule.l_i:
            return length
        if self.prompt is not None:
            if length < self.prompt:
                raise UnsupportedError(
                    f"the first {length} of the prompt's {self.prompt} tokens came alone, and "
                    "there are "
                    "virtual tokens to put behind all of them. Leave prefill_chunk_size out."
                )
            return self.prompt
        last: int | Tensor = length
        if mask is not None:
            last = length - mask.flip(1).long().argmax(dim=1, keepdim=True)
        if labels is None or labels.dim() != 2 or labels.shape[1] != length:
            return last
        told = labels != -100
        return torch.where(
            told.any(dim=1, keepdim=True), told.long().argmax(dim=1, keepdim=True), last
        )

    def _vectors(self, rule: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings before and after; zeros where every block replaces them."""
        site: Any = (
            layers_of(self.base)[str(self.switch.current(self.base.training))]
            if rule.at == "embeddings"
            else None
        )
        empty = {
            "before": x.new_zeros(rule.l_p, x.shape[2]),
            "after": x.new_zeros(rule.l_i, x.shape[2]),
        }
        before, after = (getattr(site, name, none) for name, none in empty.items())
        return before, after

    def _begun(self, frame: Frame) -> None:
        self.frame = frame
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._frames.append((torch._C._autograd._get_sequence_nr(), frame))

    def _frame_now(self) -> Frame | None:
        """Of the forward that runs, or that backward runs again."""
        if self.frame is not None or torch.compiler.is_compiling():
            return self.frame
        made = (
            recomputed()
        )  # of a block alone: transformers before 5.24 recompute it with its hooks
        if made is None:
            return None
        found = next((frame for since, frame in reversed(self._frames) if since <= made), None)
        if found is None:
            raise WeftError(
                "backward recomputes a forward that ran too many forwards ago. Call backward() "
                "sooner."
            )
        return found

    def _shift(self, active: Any, given: Mapping[str, Any], past: int) -> Tensor | None:
        """Position ids with a prefix before them; None where nothing is shifted."""
        if not self.decoder or "position_ids" not in self._names:
            return None
        x = _tokens(given)
        if x is None:
            return None
        names = active.names if isinstance(active, PerRow) else [active]
        shifts = [getattr(self.rules.get(str(name)), "shift", 0) for name in names]
        if not any(shifts):
            return None
        positions = given.get("position_ids")
        if positions is None:
            positions = self._default_positions(x, given.get("attention_mask"), past)
        self._check_room(past + x.shape[1] + max(shifts))
        each = torch.tensor(shifts, device=x.device)[:, None].repeat_interleave(
            max(1, x.shape[0] // len(shifts)), dim=0
        )
        return positions + (each if isinstance(active, PerRow) else shifts[0])

    def _check_room(self, needed: int) -> None:
        """Learned positions end somewhere, and the model's own error would not say why they do."""
        if self._limit is not None and needed > self._limit:
            raise UnsupportedError(
                f"input and virtual tokens take {needed} positions, and the model has learned "
                f"{self._limit}. Shorten the input, take fewer virtual tokens, or positions='kept'."
            )

    def _default_positions(self, x: Tensor, mask: Any, past: int) -> Tensor:
        """What the model would take: columns, or (OPT) the tokens that the mask counts."""
        if isinstance(mask, Tensor) and mask.dim() == 2 and self._counts_tokens:
            return (mask.long().cumsum(dim=1) * mask.long() - 1)[:, past:]
        return torch.arange(past, past + x.shape[1], device=x.device)[None]

    def _stripped(self, part: Any, frame: Frame) -> Any:
        if isinstance(part, tuple):
            return tuple(self._stripped(p, frame) for p in part)
        if not isinstance(part, Tensor) or part.dim() != 3:
            return part
        if not frame.answers and part.shape[1] == frame.length:
            return part  # read behind an encoder's blocks
        if part.shape[1] != frame.total:
            raise WeftError(
                f"the model returned {part.shape[1]} positions, and {frame.total} with virtual "
                "tokens entered; "
                "they cannot be told apart from real ones. Please report this architecture."
            )
        return take(part, frame.seen().expand(part.shape[0], -1))

    def _marked(self, store: Any, frame: Frame) -> Any:
        if hasattr(store, "get_seq_length"):
            setattr(store, _MARK, (self.switch.current(self.base.training), frame))
        return store


def named(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a forward by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def parameters_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of a forward's arguments, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _code_names(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.unwrap(cls.forward).__code__.co_names)


def _tokens(given: Mapping[str, Any]) -> Tensor | None:
    """What a forward reads: ids or embeddings."""
    ids: Tensor | None = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


def _learned_positions(base: nn.Module) -> int | None:
    """How many positions the model has a table for; None where they are computed (rotary,
    ALiBi).
    """
    words = base.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in base.children() if isinstance(m, nn.Embedding) and m is not words]
    return min((int(m.num_embeddings) - int(getattr(m, "offset", 0)) for m in tables), default=None)


def _plain_mask(mask: Any) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    raise UnsupportedError(
        "virtual tokens need the attention mask as [rows, tokens]; this one was prepared "
        "beforehand (a "
        "static cache does that: generate with the default, dynamic one)."
    )


def _generate(gate: Gate, replaced: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`; while it runs, the prompt's length is known, whatever is
    generated behind it.
    """
    cls: Any = type(gate.speaker)
    own = replaced if replaced is not None else partial(cls.generate, gate.speaker)
    prompt = next(
        (
            t
            for t in (
                kwargs.get("inputs_embeds"),
                *args[:1],
                kwargs.get("inputs"),
                kwargs.get("input_ids"),
            )
            if isinstance(t, Tensor)
        ),
        None,
    )
    store = next((kwargs[key] for key in _CACHES if kwargs.get(key) is not None), None)
    if getattr(store, _MARK, (None,))[0] is not None and store.get_seq_length():  # type: ignore[union-attr]
        raise UnsupportedError(
            "this key-value cache holds virtual tokens, which `generate` would count as the "
            "text's, and "
            "so leave out as many of the new ones. Give it the whole text, and no cache."
        )
    gate.prompt = None if prompt is None else int(prompt.shape[1])
    try:
        return own(*args, **kwargs)
    finally:
        gate.prompt = None


def _next_token(above: Sequence[nn.Module]) -> bool:
    """The model's labels are the next tokens. A head of transformers that cannot generate labels
    every token, or the row.
    """
    known = [m.can_generate() for m in above if callable(getattr(m, "can_generate", None))]  # type: ignore[operator]
    return any(known) or not known


def looks_back(cls: type[nn.Module]) -> bool:
    """Tokens see those before them only, in every configuration."""
    names = _code_names(cls)
    return "create_causal_mask" in names and "is_decoder" not in names
