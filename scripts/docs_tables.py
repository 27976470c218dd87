"""Writes the generated tables of docs/ from the code, between `<!-- generated: NAME -->` and `<!--
/generated -->`.

Usage: python scripts/docs_tables.py [PAGE ...]     (or: make docs-tables)

The tables are committed instead of being generated when the site is built. So the pages can be read
in the repository, a changed default or count is visible in review, and the site builds without
Weft. tests/docs checks that the pages are what this script writes.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from docs_bases import bases_block
from docs_claims import claim, verdicts
from docs_fields import meaning, order, written
from docs_records import measured

import weft
from weft import cli, methods, papers
from weft.checkpoint.export import FORMS
from weft.cli import COMMANDS
from weft.errors import UnsupportedError, WeftError
from weft.model.memory import estimate
from weft.papers.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Methods that have a page but are not in this version yet. A test fails once they are.
COMING: tuple[str, ...] = ()
BLOCK = re.compile(
    r"(<!-- generated: (?P<name>[^>]+?) -->\n)(?P<text>.*?)(<!-- /generated -->)", re.DOTALL
)
MODELS = ("RoBERTa-base", "GPT-2 medium", "LLaMA-7B")
NOT_YET = "This version of Weft does not have this method yet.\n"
# The paper's setting beside the defaults: queries and values. LLaMA's names serve all three models.
QV = r".*\.(query|value|q_proj|v_proj)"
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "LoRA": [{}, {"r": 8, "targets": QV}],
    "DoRA": [{}, {"r": 8, "targets": QV}],
    "LoRAFA": [{}, {"r": 8, "targets": QV}],
    "DyLoRA": [{}, {"r": 8, "targets": QV}],
    "AdaLoRA": [{}, {"r": 12, "targets": QV}],
    "VeRA": [{}, {"r": 1024, "targets": QV}],
    "DVoRA": [{}, {"r": 1024, "targets": QV}],
    "Bottleneck": [
        {"preset": p} for p in ("houlsby", "lin", "pfeiffer", "drop", "series", "parallel")
    ],
    "Prefix": [{"n": 10}],
    "PreEmbed": [{"l_p": 16, "l_i": 8}],
    "PreLayer": [{"l_p": 8, "l_i": 8}],
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; columns of `right` are right-aligned."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    cells = [head, rule, *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def size(nbytes: float) -> str:
    """Bytes in three digits, because the header's length depends on library versions."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"


def shown(config: dict[str, Any]) -> str:
    """A setting as the user writes it."""
    named = {k: "q and v" if v == QV else v for k, v in config.items()}
    return ", ".join(v if v == "q and v" else f"{k}={v}" for k, v in named.items()) or "defaults"


@cache
def model_of(name: str) -> Any:
    """One of MODELS on the meta device."""
    return ARCHITECTURES[name].on_meta()


@contextmanager
def attached(model: Any, config: Any) -> Iterator[Any]:
    adapter = weft.attach(model, config)
    try:
        yield adapter
    finally:
        weft.detach(model, adapter.name)


@cache
def counted(model: str, method: str, setting: str) -> tuple[int, int, int, float] | str:
    """Trained numbers including the head's, the head's, bytes of the file, % of the base; or why the
    method does not apply.
    """
    root = model_of(model)
    try:
        with attached(
            root, methods.from_json({"method": method, **json.loads(setting)})
        ) as adapter:
            base = adapter.plan().base_parameters
            return (
                adapter.num_parameters,
                adapter.num_head_parameters,
                adapter.nbytes,
                100 * adapter.num_parameters / base,
            )
    except WeftError as error:
        return str(error).partition(": ")[2].rstrip(".")


def fields_block(method: str) -> str:
    cls = methods.METHODS[method]
    below = written(cls)
    rows = [
        (
            f"`{f.name}`",
            f"`{f.default!r}`" if f.default is not MISSING else "",
            meaning(method, f.name, below.get(f.name)),
        )
        for f in sorted(fields(cls), key=lambda f: order(f.name))
    ]
    return table(["field", "default", "meaning"], rows)


def cost_block(method: str) -> str:
    rows, reasons = [], []
    for setting in SETTINGS.get(method, [{}]):
        for model in MODELS:
            found = counted(model, method, json.dumps(setting))
            if isinstance(found, str):
                reasons.append(f"{model}: {found}.")
                continue
            numbers, head, nbytes, share = found
            held = f" (head {head:,})" if head and head != numbers else ""
            rows.append(
                (model, shown(setting), f"{numbers:,}{held}", f"{share:.3g} %", size(nbytes))
            )
    text = table(["model", "setting", "trained numbers", "of the base", "file"], rows, (2, 3, 4))
    return text + "".join(f"\n{reason}\n" for reason in dict.fromkeys(reasons))


@cache
def rebuilt() -> tuple[papers.Result, ...]:
    return tuple(papers.rebuild(papers.tables()))


def papers_block(method: str) -> str:
    """The rows of the papers' tables whose first method is this one."""
    rows = []
    for result in rebuilt():
        if not result.row.methods or result.row.methods[0]["method"] != method:
            continue
        unit = " %" if result.row.unit == "percent" else ""
        ours = "" if result.computed is None else _counted(result.computed, result.row.unit)
        why = "" if result.status == "reproduced" and result.why != "truncated" else result.why
        if method in COMING:
            ours, why = "", "waits for the method"
        rows.append((result.table.name, result.row.row, result.row.printed + unit, ours, why))
    if not rows:
        return "No table of the three papers has a row of this method.\n"
    return table(["table", "row", "printed", "ours", "reason if different"], rows, (2, 3))


def _counted(value: float, unit: str) -> str:
    return f"{value:.4f} %" if unit == "percent" else f"{value:,}{' B' if unit == 'bytes' else ''}"


def numbers_block() -> str:
    rows = []
    for method in methods.METHODS:
        cells = []
        for model in MODELS:
            found = counted(model, method, json.dumps(SETTINGS.get(method, [{}])[0]))
            cells.append("none" if isinstance(found, str) else f"{found[0]:,}")
        setting = shown(SETTINGS.get(method, [{}])[0])
        rows.append((link(method), setting, *cells))
    return table(["method", "setting", *MODELS], rows, (2, 3, 4))


def link(method: str) -> str:
    return f"[{method}](methods/{method.lower()}.md)"


def small() -> Any:
    """A GPT-2 of two blocks: it has biases, a head of its own, attention and MLPs."""
    import transformers

    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61,
            n_embd=24,
            n_layer=6,
            n_head=3,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    ).eval()


@cache
def abilities(method: str) -> dict[str, str]:
    """What the method supports, tried on a small model."""
    cls, model = methods.METHODS[method], small()
    adapter = weft.attach(
        model, methods.from_json({"method": method, **SETTINGS.get(method, [{}])[0]})
    )
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    found = {
        "merges": yes(cls.mergeable),
        "mixed batches": yes(works(partial(weft.use, model, ["default", None]))),
    }
    weft.use(model, "default")
    with tempfile.TemporaryDirectory() as folder:
        weft.save(model, f"{folder}/saved")
        kind = json.loads(Path(folder, "saved", "adapter_config.json").read_text(encoding="utf-8"))[
            "peft_type"
        ]
        found["file"] = "Weft's own" if kind.startswith("WEFT") else f"peft's {kind}"
        forms = [
            form
            for form in FORMS
            if works(partial(weft.export, f"{folder}/saved", form, f"{folder}/as-{form}"))
        ]
    found["exports to"] = ", ".join(forms) or "no"
    found["rank can be reduced"] = yes(adapter.config.nested)
    found["acts at a step"] = yes(adapter.config.follows_steps)
    return found


def works(action: Callable[[], Any]) -> bool:
    try:
        action()
    except UnsupportedError:
        return False
    return True


def yes(value: bool) -> str:
    return "yes" if value else "no"


def abilities_block() -> str:
    names = list(methods.METHODS)
    head = list(abilities(names[0]))
    return table(["method", *head], [(link(m), *abilities(m).values()) for m in names])


def ability_block(method: str) -> str:
    found = abilities(method)
    return table(list(found), [list(found.values())])


def memory_block() -> str:
    """Memory of a training step, computed from shapes; exact for tensors."""
    root, rows = model_of("RoBERTa-base"), []
    ids = {"input_ids": torch.zeros(8, 128, dtype=torch.int64, device="meta")}
    for method in methods.METHODS:
        try:
            with attached(
                root, methods.from_json({"method": method, **SETTINGS.get(method, [{}])[0]})
            ) as adapter:
                need = estimate(adapter, ids)
        except WeftError:  # not for an encoder
            continue
        state = need.trained + need.gradients + need.optimiser
        rows.append(
            (link(method), size(state), size(need.activations or 0), size(need.total - need.base))
        )
    head = ["method", "tensors, gradients, AdamW", "activations", "beyond the base"]
    return table(head, rows, (1, 2, 3)) + f"\n{versions()}\n"


def versions() -> str:
    """The versions that determine what autograd keeps."""
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def commands_block() -> str:
    return "\n".join(command_text(name) for name in COMMANDS)


def parser_of(name: str) -> Any:
    """The parser that `weft NAME` uses."""
    command = importlib.import_module(f"weft.cli.{name}")
    parser = cli.Parser(prog=f"weft {name}", description=command.HELP, allow_abbrev=False)
    command.add_arguments(parser)
    return parser


def command_text(name: str) -> str:
    """Not argparse's own text, whose form differs between versions of Python."""
    parser, rows = parser_of(name), []
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        value = action.metavar or ("|".join(action.choices) if action.choices else None)
        value = value or (action.dest.upper() if action.nargs != 0 else "")
        named = " ".join(filter(None, [*action.option_strings[:1], value]))
        needed = " (required)" if action.required and action.option_strings else ""
        rows.append((f"`{named}`", (action.help or "").replace("%%", "%") + needed))
    return (
        f"## weft {name}\n\n{parser.description[0].upper() + parser.description[1:]}.\n\n"
        + table(["option", "meaning"], rows)
    )


ENTRY = re.compile(r"^::: (weft\.[\w.]+)$", re.MULTILINE)


def entries() -> dict[str, list[str]]:
    """The API reference: file of each page -> its symbols."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    found = {page.name: ENTRY.findall(page.read_text(encoding="utf-8")) for page in pages}
    return {page: names for page, names in found.items() if names}


def reference_block() -> str:
    """Every symbol, by page. The links are mkdocstrings'."""
    rows = []
    for page, names in entries().items():
        heading = (DOCS / "reference" / page).read_text(encoding="utf-8").partition("\n")[0]
        links = ", ".join(f"[`{name}`][{name}]" for name in names)
        rows.append((f"[{heading.removeprefix('# ')}]({page})", links))
    return table(["page", "symbols"], rows)


ONE: dict[str, Callable[[str], str]] = {
    "fields": fields_block,
    "cost": cost_block,
    "papers": papers_block,
    "measured": measured,
    "abilities": ability_block,
    "claim": claim,
}
ALL: dict[str, Callable[[], str]] = {
    "numbers": numbers_block,
    "all abilities": abilities_block,
    "memory": memory_block,
    "commands": commands_block,
    "verdicts": verdicts,
    "reference": reference_block,
    "bases": bases_block,
}


def block(name: str) -> str:
    """Returns the text of a generated block. Raises KeyError for an unknown name."""
    if name in ALL:
        return ALL[name]()
    kind, _, method = name.partition(" ")
    if method in COMING and kind not in ("papers", "measured"):
        return NOT_YET
    return ONE[kind](method)


def filled(text: str, keep: Callable[[str], bool] = lambda name: False) -> str:
    """Returns a page with its generated blocks rewritten, except those to keep."""
    return BLOCK.sub(
        lambda m: m[0] if keep(m["name"]) else f"{m[1]}\n{block(m['name'])}\n{m[4]}", text
    )


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def main() -> None:
    if len(sys.argv) == 1:
        import docs_lists

        docs_lists.main()  # first: the table of the reference is made from its lists
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    for page in chosen:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
