"""The rules of the house (who may import whom, what importing costs), read from the source
itself.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import weft
from weft.methods import METHODS

SOURCE = Path(weft.__file__).resolve().parent
FILES = sorted(SOURCE.rglob("*.py"))
PYTHON = sorted([*FILES, *Path(__file__).resolve().parent.rglob("*.py")])
# A room may import rooms to its right. `tasks` is beside them: it imports no room, and only these
# may use it.
ROOMS = [
    "cli",
    "compare",
    "training",
    "inference",
    "encoding",
    "auditing",
    "analysis",
    "checkpoint",
    "model",
    "methods",
    "ops",
]
BESIDE, USERS_OF_TASKS = "tasks", {"cli", "compare", "training", "inference", "encoding"}
# `papers` stands beside too: only `cli` may use it, and it may import these.
BELOW_PAPERS = {"checkpoint", "model", "methods", "models"}
# So do `models`, classes of transformers' kind, which import no room.
MODELS, USERS_OF_MODELS = "models", {"compare", "inference", "tasks", "training"}
FREE = {"errors", "__version__", "untrusted"}  # below every room; standard library only
# Modules outside the standard library that a room may import at all; the core lives on torch and
# safetensors.
LIBRARIES = {
    "ops": {"torch", "triton"},
    "methods": {"torch"},
    "model": {"torch"},
    "checkpoint": {"torch", "safetensors"},
    "training": {
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "matplotlib",
        "tqdm",
        "yaml",
        "mlflow",
        "wandb",
    },
    "inference": {"torch", "transformers", "lm_eval"},
    "encoding": {"torch", "transformers", "PIL"},
    "auditing": {"torch"},
    "tasks": {
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "sklearn",
        "scipy",
        "sacrebleu",
        "nltk",
        "rouge_score",
        "pycocoevalcap",
        "datasets",
        "pyarrow",
        "gguf",
        "safetensors",
        "tokenizers",
    },
    "compare": {
        "torch",
        "transformers",
        "numpy",
        "scipy",
        "matplotlib",
        "statsmodels",
        "tqdm",
        "sklearn",
        "PIL",
        "optuna",
        "sqlalchemy",
        "psycopg",
        "psutil",
        "filelock",
    },
    "analysis": {"torch", "numpy", "scipy", "matplotlib"},
    "cli": {"torch", "transformers"},
    "papers": {"torch", "transformers"},
    "models": {"torch", "transformers"},
}
# Classes that derive from transformers' own; what needs them imports them inside a function.
DERIVED = (
    *(f"training/{name}.py" for name in ("trainer", "callbacks", "log", "reports", "loop")),
    "models/vl_bart.py",
)
# Files and functions that are longer than the limits of the tests below.
LONGER_FILES = {"methods/base.py": 429, "model/virtual.py": 526, "tasks/mt_bench.py": 417}
LONGER_FUNCTIONS = {"cli/compare.py: add_arguments": 92, "ops/fused.py: forward": 67}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))


def room_of(path):
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """(module as an absolute dotted name, names taken from it, is it at the top of the file, is it
    for types only).
    """
    tree = tree_of(path)
    package = ["weft", *path.relative_to(SOURCE).parts[:-1]]
    typed = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, [], id(node) in top, id(node) in typed) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield full, [a.name for a in node.names], id(node) in top, id(node) in typed


def rooms_imported(path):
    for module, names, _, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "weft":
            yield from {parts[1]} if len(parts) > 1 else set(names)


@each_file
def test_arrows_run_down_only(path):
    room = room_of(path)
    if room == "":
        assert path.name in ("__init__.py", "__main__.py", "errors.py")
        return
    below = {room} | FREE | (set(ROOMS[ROOMS.index(room) + 1 :]) if room in ROOMS else set())
    if room in USERS_OF_TASKS:
        below.add(BESIDE)
    if room in USERS_OF_MODELS:
        below.add(MODELS)
    below |= {"cli": {"papers"}, "papers": BELOW_PAPERS}.get(room, set())
    wrong = set(rooms_imported(path)) - below
    assert not wrong, f"{room} may not import {sorted(wrong)}"


@each_file
def test_a_room_imports_the_libraries_it_may(path):
    room = room_of(path)
    outside = (
        {m.split(".")[0] for m, _, _, _ in imports(path)}
        - set(sys.stdlib_module_names)
        - {"weft", "__future__"}
    )
    assert outside <= LIBRARIES.get(room, set()), f"{room or 'the top'} may not import {outside}"


@each_file
def test_transformers_is_imported_where_it_is_needed_and_not_before(path):
    derived = str(path.relative_to(SOURCE)) in DERIVED
    for module, names, top, typed in imports(path):
        costly = {*names, module.rpartition(".")[2]} & {
            Path(file).stem for file in DERIVED
        } and module.startswith("weft.training")
        assert not (costly and top and not typed and not derived), (
            f"{module} brings transformers: import it late"
        )
        if derived and module.split(".")[0] == "transformers":
            continue
        if module.split(".")[0] in (
            "transformers",
            "peft",
            "matplotlib",
            "scipy",
            "sklearn",
            "statsmodels",
            "sacrebleu",
            "nltk",
            "rouge_score",
            "pycocoevalcap",
            "datasets",
            "pyarrow",
            "lm_eval",
            "optuna",
            "sqlalchemy",
            "psycopg",
            "psutil",
        ):
            assert not top and not typed, (
                f"{module} at the top of the file makes everybody pay for it"
            )


def docstrings(tree):
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "model"], ids=lambda p: p.name)
def test_the_model_room_knows_no_method_by_name(path):
    tree = tree_of(path)
    for node in ast.walk(tree):
        names = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}
        name = getattr(node, names.get(type(node), ""), None)
        assert name not in METHODS, f"line {getattr(node, 'lineno', '?')}: {name}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in METHODS, f"line {node.lineno}: {node.value!r}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) in ("methods", "ops")], ids=lambda p: p.name
)
def test_methods_and_ops_know_no_model_class_and_no_file(path):
    for module, names, _, _ in imports(path):
        if (module, names) == ("os", ["environ"]):  # which is no file
            continue
        assert module.split(".")[0] not in (
            "os",
            "io",
            "pathlib",
            "json",
            "shutil",
            "tempfile",
            "pickle",
        ), module
        if module == "torch.nn":
            assert set(names) <= {"Module", "Parameter"}, names
    for node in ast.walk(tree_of(path)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "nn"
        ):
            assert node.attr in ("Module", "Parameter"), f"line {node.lineno}: nn.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", f"line {node.lineno}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "ops"], ids=lambda p: p.name)
def test_ops_know_tensors_only(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"nn\.Module|\bconfig\b|\bHost\b|\bParams\b", text)


@each_file
def test_nothing_is_unpickled_and_no_code_is_run_from_text(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "torch.load", "pickle.load", "pickle.loads"), (
                f"line {node.lineno}: {name}"
            )


@each_file
def test_files_are_short(path):
    limit = LONGER_FILES.get(str(path.relative_to(SOURCE)), 400)
    assert path.read_text(encoding="utf-8").count("\n") <= limit, (
        "over about 400 lines a file has two subjects"
    )


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.name)
def test_no_file_names_a_path_of_somebodys_machine(path):
    text = path.read_text(encoding="utf-8")
    places = ["/" + "work/", "/" + "tmp/", "/" + "root/", "/" + "home/", "." + "library"]
    assert not [p for p in places if p in text]


def test_functions_fit_on_a_screen():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                where = f"{path.relative_to(SOURCE)}: {node.name}"
                assert length <= LONGER_FUNCTIONS.get(where, 60), f"{where} has {length} lines"


def run(code, *flags):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_weft_imports_torch_and_safetensors_and_no_more():
    code = (
        "import sys, torch; before = set(sys.modules); import weft; import json; "
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    new = (
        set(json.loads(run(code))) - set(sys.stdlib_module_names) - {"weft", "safetensors", "json"}
    )
    assert {m for m in new if not m.startswith("_")} <= {"torch", "numpy", "packaging"}, new
    loaded = run(
        "import sys, torch; before = set(sys.modules); import weft; print(*set(sys.modules) - "
        "before)"
    ).split()
    for heavy in (
        "transformers",
        "peft",
        "accelerate",
        "scipy",
        "sklearn",
        "matplotlib",
        "statsmodels",
        "pandas",
        "PIL",
        "tqdm",
        "optuna",
        "sqlalchemy",
        "psutil",
        "torch._dynamo",
        "weft.compare",
        "weft.training",
        "weft.inference",
        "weft.encoding",
        "weft.analysis",
        "weft.cli",
        "weft.tasks",
        "weft.papers",
    ):
        assert heavy not in loaded, f"import weft imports {heavy}"


def test_importing_weft_reads_no_package_metadata():
    code = (
        "import sys, torch, importlib.metadata as m\n"
        "def refuse(*a, **k): raise SystemExit('importlib.metadata was asked')\n"
        "m.version = m.distribution = m.distributions = m.entry_points = m.packages_distributions "
        "= refuse\n"
        "import weft; print(weft.__version__)"
    )
    assert run(code).strip() == weft.__version__


def test_the_core_works_without_numpy():
    code = (
        "import sys, warnings; sys.modules['numpy'] = None; warnings.simplefilter('ignore')\n"
        "import torch, weft\n"
        "model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 5))\n"
        "for i, config in enumerate((weft.DoRA(r=2), weft.DVoRA(r=3), weft.BitFit())):\n"
        "    adapter = weft.attach(model, config, name=f'a{i}')\n"
        "    for p in adapter.parameters(): p.data += 0.1\n"
        "    weft.merge(model, f'a{i}', verify=torch.randn(3, 7)); weft.unmerge(model)\n"
        "    weft.snapshot(model); print(adapter.plan())\n"
        "print(weft.adapters(model)['a1'].sites['0'].shared.checksum())\n"
    )
    assert re.search(r"^[0-9a-f]{16}$", run(code), re.MULTILINE)


def test_the_public_names_are_there_and_documented():
    assert set(weft.__all__) <= set(dir(weft)) and len(set(weft.__all__)) == len(weft.__all__)
    for name in weft.__all__:
        assert getattr(weft, name).__doc__, name
    for error in (
        "ConfigError",
        "TargetError",
        "CheckpointError",
        "MergeError",
        "AuditError",
        "UnsupportedError",
    ):
        assert issubclass(getattr(weft, error), weft.WeftError)
