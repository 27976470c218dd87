"""YAML configurations and data files, damaged at random."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz_adapters import Finding, check_text
from fuzz_mutations import VALUES, Raw, dumps, flipped, mutated

import weft

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "recipes" / "examples").glob("*.yaml"))
SNIPPETS = [
    "? [1, 2]\n: 3\n",
    "&a [*a]",
    "*a",
    "<<: {lr: 3}",
    "!!python/object:os.system x",
    "!!int x",
    "!!bool maybe",
    "!!set {a, b}",
    "!!timestamp x",
    "1:30",
    "010",
    "0o17",
    "yes",
    "2026-01-01",
    "1_000",
    "1e3",
    ".nan",
    "~",
    "null",
    "'",
    '"\\ud800"',
    "- ",
    "{",
    "|\n  x\n",
    "9" * 5000,
    "[" * 300,
    "\t",
    "\ufeff",
    "\x85",
]


def yaml_case(rng: Random, folder: Path, home: Path) -> str:
    """A damaged configuration is refused, or each value is what a reader of the file sees."""
    from weft.training.config import dump, read_config

    text = rng.choice(EXAMPLES).read_text(encoding="utf-8")
    data = _damaged_yaml(rng, text)
    path = folder / "c.yaml"
    path.write_bytes(data)
    setting = f"{rng.choice(['optim.lr', 'method.r', 'train.batch'])}={rng.choice(SNIPPETS)}"
    settings = [setting] if rng.random() < 0.2 else []
    try:
        config = read_config(path, settings)
    except weft.WeftError as error:
        check_text(error)
        return "yaml refused"
    again = folder / "again.yaml"
    again.write_text(dump(config), encoding="utf-8")
    if read_config(again) != config:
        raise Finding("the written configuration is another one")
    if not settings and b"!" not in data and b"<<" not in data and b"&" not in data:
        _check_meaning(config, data.decode("utf-8"))
    return "yaml read"


def _damaged_yaml(rng: Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    match rng.randrange(6):
        case 0:
            return flipped(rng, text.encode())
        case 1:
            at = rng.randrange(len(text))
            return (text[:at] + rng.choice(SNIPPETS) + text[at:]).encode("utf-8", "surrogatepass")
        case 2:
            at = rng.randrange(len(lines))
            lines[at:at] = [rng.choice(lines)]
        case 3:
            at = rng.randrange(len(lines))
            key, colon, _ = lines[at].partition(":")
            value = rng.choice([*SNIPPETS, *map(dumps, VALUES)])
            lines[at] = f"{key}{colon} {value}\n"
        case 4:
            at = rng.randrange(len(lines))
            lines[at] = rng.choice([" ", "  ", "- ", "# "]) + lines[at]
        case 5:
            import yaml

            return dumps(mutated(rng, yaml.safe_load(text))).encode("utf-8", "surrogatepass")
    return "".join(lines).encode("utf-8", "surrogatepass")


def _check_meaning(config: Any, text: str) -> None:
    import yaml

    from weft.training.config import to_dict

    plain = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar as its text
    _compare(to_dict(config), plain, "")


def _compare(found: Any, plain: Any, where: str) -> None:
    if isinstance(plain, dict) and isinstance(found, dict):
        for key, value in plain.items():
            if where == "method." and key == "name":
                continue
            if key not in found and value in ("", "null", "~", []):
                continue
            _compare(found.get(key), value, f"{where}{key}.")
    elif isinstance(plain, list) and isinstance(found, list):
        if len(plain) != len(found) and where != "method.train.":
            raise Finding(f"{where} has {len(found)} values, and {len(plain)} in the file")
        for one, other in zip(found, plain, strict=False):
            _compare(one, other, where)
    elif isinstance(plain, str) and not _means(found, plain):
        raise Finding(f"{where}: {found!r} from {plain!r}")


def _means(found: Any, plain: str) -> bool:
    if isinstance(found, bool):
        return plain.lower() in (("true", "yes", "on") if found else ("false", "no", "off"))
    if found is None or isinstance(found, dict | list):
        return plain.lower() in ("", "null", "~") or isinstance(found, list)
    if isinstance(found, str):
        return found == plain
    number = plain.replace("_", "").lower()
    if number in (".inf", "+.inf", "-.inf", ".nan"):
        return False
    value = int(number, 0) if number.lstrip("+-").startswith(("0x", "0b")) else float(number)
    return bool(value == found)


TABLES = [
    'text,label\ngood film,pos\nbad film,neg\n"a, ""quoted"" one\nof two lines",pos\n',
    "prompt,completion\n2+2=,4\nthe sky is,blue\n",
    "sentence1,sentence2,label\na,b,0.5\nc,d,1\n",
]
ROWS = [
    {"prompt": "two and two", "completion": "four"},
    {"text": "a line of text"},
    {"text": "a", "label": "x"},
    {"instruction": "say", "input": "hello", "output": "hello"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
]


def data_case(rng: Random, folder: Path, home: Path) -> str:
    """A damaged data file is refused, or every text of a sample stands in the file."""
    from weft.training.config.sections import DataSection
    from weft.training.data import load_samples

    ending = rng.choice(["csv", "tsv", "jsonl", "json"])
    data = _damaged_data(rng, ending)
    path = folder / f"d.{ending}"
    path.write_bytes(data)
    try:
        samples = load_samples(DataSection(train=str(path)), None, 0)[0]
    except weft.WeftError as error:
        check_text(error)
        return f"{ending} refused"
    known = {part for text in _texts(data, ending) for part in (text, text.strip())}
    whole = "\n".join(known)
    for text in _strings(samples.rows):
        parts = text.split("\n\n")  # instruction and input
        if text not in known and not all(part in known or part in whole for part in parts):
            raise Finding(f"{text!r:.200} stands nowhere in the file")
    return f"{ending} read"


def _damaged_data(rng: Random, ending: str) -> bytes:
    if ending in ("csv", "tsv"):
        text = rng.choice(TABLES)
        text = text.replace(",", "\t") if ending == "tsv" else text
        encoding = rng.choice(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "cp1252"])
        return flipped(rng, text.encode(encoding))
    row = rng.choice(ROWS)
    rows = [row if rng.random() < 0.5 else mutated(rng, row) for _ in range(3)]
    text = dumps(rows) if ending == "json" else "\n".join(map(dumps, rows)) + "\n"
    data = text.encode("utf-8", "surrogatepass")
    return flipped(rng, data) if rng.random() < 0.4 else data


def _texts(data: bytes, ending: str) -> list[str]:
    """Every text that an independent reader finds in the file."""
    text = _decoded(data)
    if ending in ("csv", "tsv"):
        delimiter = "\t" if ending == "tsv" else ","
        loose = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        plain = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE
        )
        cells = [cell for reader in (loose, plain) for row in reader for cell in row]
        return [*cells, *(cell.replace("\r\n", "\n") for cell in cells)]
    try:
        return _strings(json.loads(text))
    except ValueError:
        return [s for line in text.split("\n") if line.strip() for s in _strings(json.loads(line))]


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _strings(value: Any) -> list[str]:
    """The texts in a value; a number or boolean is a text as JSON writes it."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool | int | float):
        return [json.dumps(value)]
    if isinstance(value, dict):
        return [s for k, v in value.items() if k != "role" for s in _strings(v)]
    if isinstance(value, list | tuple):
        return [s for v in value for s in _strings(v)]
    return []


__all__ = ["Raw", "data_case", "yaml_case"]
