"""One dialect over the package, kept by reading its syntax trees: CONTRIBUTING.md says the rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowrank"
FILES = sorted(PACKAGE.rglob("*.py"))

ERRORS = {"InputError", "JobError", "RowError", "ValueError"}
NAMES = {"Git", "Liger", "Muon"}
"""Plain words that are names, and begin with a capital wherever they stand."""

Definition = ast.FunctionDef | ast.ClassDef


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


class Texts:
    """The first and the last piece of every text that an expression of one file may be; None where only a run knows."""

    def __init__(self, tree: ast.Module) -> None:
        self.values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self.values.setdefault(ast.unparse(target), []).append(node.value)
            elif isinstance(node, ast.FunctionDef):
                returned = [r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value]
                self.values.setdefault(f"{node.name}()", []).extend(returned)

    def of(self, node: ast.expr) -> Iterator[tuple[str | None, str | None]]:
        match node:
            case ast.Constant(value=str(text)) if text:
                yield text, text
            case ast.JoinedStr(values=[first, *_] as values):
                ends = [part.value if isinstance(part, ast.Constant) else None for part in (first, values[-1])]
                yield str(ends[0]) if ends[0] else None, str(ends[1]) if ends[1] else None
            case ast.BinOp(op=ast.Add()):
                yield from ((first, last) for first, _ in self.of(node.left) for _, last in self.of(node.right))
            case ast.IfExp():
                yield from (*self.of(node.body), *self.of(node.orelse))
            case ast.BoolOp():
                yield from (pair for value in node.values for pair in self.of(value))
            case ast.Name(id=name):
                yield from self.held_by(name)
            case ast.Call(func=ast.Name(id=name)):
                yield from self.held_by(f"{name}()")
            case ast.Constant():
                pass
            case _:
                yield None, None

    def held_by(self, name: str) -> Iterator[tuple[str | None, str | None]]:
        values = self.values.pop(name, [])  # put back after: a name may be built on itself
        yield from [pair for value in values for pair in self.of(value)]
        self.values[name] = values


def capital(text: str) -> bool:
    """Whether a text begins as a sentence does, and not with a name or a word of code."""
    word = re.match(r"[A-Z][a-z]*\b(?![A-Z_.(=])", text)
    return bool(word) and word.group() not in NAMES


def breaches_of_messages(source: str) -> list[str]:
    tree = ast.parse(source)
    texts, found = Texts(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name_of(node) in ERRORS:
            what = node.args[0] if node.args else given.get("what", ast.Constant(None))
            if name_of(node) == "RowError" and node.args[1:]:
                given["fix"] = node.args[1]
            for first, last in texts.of(what):
                if (first and capital(first)) or (last and last.endswith(".")):
                    found.append(f"{node.lineno}: a message begins in lower case and has no full stop: {first} {last}")
        for first, last in texts.of(given.get("fix", ast.Constant(None))):
            if (first and not first[0].isupper()) or (last and not last.endswith(".")):
                found.append(f"{node.lineno}: a fix is a sentence, with a capital and a full stop: {first} {last}")
    return found


def breaches_of_tensor(source: str) -> list[str]:
    return [
        f"{node.lineno}: torch.Tensor is written out"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and "Tensor" in {a.name for a in node.names}
    ]


def definitions(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield within + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{within}{node.name}.")


def breaches_of_docstrings(source: str) -> list[str]:
    """Docstrings that only point elsewhere."""
    return [
        f"{node.lineno}: the docstring of {name} only points elsewhere"
        for name, node in definitions(ast.parse(source).body)
        if re.match(r"(See|As) (`[^`]*`|above|the class)[.;:]?$", (ast.get_docstring(node) or "").split("\n")[0])
    ]


@cache
def protocols(room: str) -> frozenset[str]:
    """The methods that a protocol of a room documents: who keeps to one repeats nothing."""
    return frozenset(
        member.name
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] == room
        for _, node in definitions(ast.parse(path.read_text(encoding="utf-8")).body)
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
        for member in node.body
        if isinstance(member, ast.FunctionDef) and ast.get_docstring(member)
    )


def undocumented(source: str) -> list[str]:
    """The public methods of public classes that have no docstring."""
    return [
        name
        for name, node in definitions(ast.parse(source).body)
        if "." in name and isinstance(node, ast.FunctionDef) and not ast.get_docstring(node)
        if not re.search(r"(^|\.)_", name)
        and not any(ast.unparse(d).endswith((".setter", "overload")) for d in node.decorator_list)
    ]


def overrides(module: str, name: str) -> bool:
    """Whether a method of a class is one that a class above it, or a protocol, has described already."""
    holder, _, method = name.rpartition(".")
    kind = import_module(module)
    for part in holder.split("."):
        kind = getattr(kind, part)
    return method in protocols(module.split(".")[1]) or any(method in vars(above) for above in kind.__mro__[1:])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names_taken(source: str) -> set[tuple[str, str]]:
    """(module, name) of all that a file takes from modules of the package, by import, by attribute or by text."""
    tree, modules, taken = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowrank":
            for alias in node.names:
                taken.add((node.module, alias.name))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            modules.update({alias.asname: alias.name for alias in node.names if alias.asname})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node.value)
            taken.add((modules.get(whole, whole), node.attr))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("lowrank."):
            taken.add(tuple(node.value.rsplit(".", 1)))
        elif isinstance(node, ast.Dict):  # a registry of files and what each of them gives
            taken.update(("", value.value) for value in node.values if isinstance(value, ast.Constant))
    return taken


@cache
def taken_from() -> dict[tuple[str, str], set[str]]:
    """Who takes each name: a file of the package, its tests, its examples or its benchmarks."""
    users: dict[tuple[str, str], set[str]] = {}
    for folder in ("lowrank", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in names_taken(path.read_text(encoding="utf-8")):
                users.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return users


def annotated(tree: ast.Module) -> set[str]:
    """The names in the annotations and bases of a file's public functions, methods and fields: types that it gives."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and not ast.unparse(node.targets[0]).startswith("_"):
            found.update(re.findall(r"\w+", ast.unparse(node.value)))
    for name, node in definitions(tree.body):
        if re.search(r"(^|\.)_(?!_)", name):
            continue
        parts = [*node.bases] if isinstance(node, ast.ClassDef) else [node.returns, *(a.annotation for a in _all(node))]
        if isinstance(node, ast.ClassDef):
            parts += [member.annotation for member in node.body if isinstance(member, ast.AnnAssign)]
        found.update(re.findall(r"\w+", " ".join(ast.unparse(part) for part in parts if part)))
    return found


def _all(function: ast.FunctionDef) -> list[ast.arg]:
    given = function.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]


def breaches_of_privacy(module: str, source: str, users: dict[tuple[str, str], set[str]]) -> list[str]:
    tree, found = ast.parse(source), []
    types = annotated(tree)
    mine = module.replace(".", "/")
    for node in tree.body:
        if not isinstance(node, Definition):
            continue
        others = (users.get((module, node.name), set()) | users.get(("", node.name), set())) - {f"{mine}.py"}
        if node.name.startswith("_"):
            if any(user.startswith("lowrank/") for user in others) and not node.name.startswith("__"):
                found.append(f"{node.lineno}: {node.name} is private, and another module takes it: {sorted(others)}")
        elif not others and node.name not in types and not node.decorator_list:
            found.append(f"{node.lineno}: {node.name} is used by this module alone: _{node.name}")
    return found


def breaches_of_init(source: str) -> list[str]:
    """An `__init__` says in its docstring what the room is for, and may hand names on; it defines nothing itself."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["it does not say what the room is for"]
    found += [
        f"{name} is defined in it"
        for name, _ in definitions(tree.body)
        if name not in ("__getattr__", "__dir__")  # lowrank and lowrank.adapters load names when they are first used
    ]
    hands_on = any(isinstance(node, ast.ImportFrom) and node.module != "__future__" for node in tree.body)
    targets = [ast.unparse(target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    if hands_on and not any("__all__" in target for target in targets):
        found.append("what it hands on stands in no __all__")
    return found


def all_breaches(module: str, source: str) -> list[str]:
    found = breaches_of_messages(source) + breaches_of_tensor(source) + breaches_of_docstrings(source)
    found += breaches_of_privacy(module, source, taken_from())
    return found + [f"{name} has no docstring" for name in undocumented(source) if not overrides(module, name)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_speaks_the_dialect(path):
    source = path.read_text(encoding="utf-8")
    assert all_breaches(module_of(path), source) == []
    assert path.name != "__init__.py" or breaches_of_init(source) == []


@pytest.mark.parametrize(
    "source",
    [
        'InputError("The file is missing")',
        'InputError("the file is missing.")',
        'errors.JobError(f"The {path} is full", where=path)',
        'RowError(what="a row without text.")',
        'raise InputError(f"{path} is missing" + (f" {more}." if more else ""))',
        'def f():\n    told = "No file."\n    raise InputError(told if there else f"{there} it is")',
        'def why():\n    return "Because."\nInputError(why())',
        'InputError("it is missing", fix="look again.")',
        'InputError("it is missing", fix="Look again")',
        'RowError("it is missing", "look again")',
        'FIX = f"pip install {name}"\nInputError("it is missing", fix=FIX)',
        'refused("it is missing", fix="look again")',
    ],
)
def test_a_message_of_another_dialect_is_found(source):
    assert len(breaches_of_messages(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'InputError("there is no file", where="A.yaml", fix="Look again.")',
        'InputError(f"AdaLoRA has no {name}", fix=f"Take {other}.")',
        'InputError("HF_HUB_OFFLINE is set")',
        'InputError("Liger has no kernels for it", fix="Set it false.")',
        'InputError(f"{error}", fix=fix or None)',
        'fix = ""\nfor part in parts:\n    fix = fix + part\nInputError("it is wrong", fix=fix)',
        'KeyError("The name.")',
    ],
)
def test_a_message_of_the_dialect_is_let_through(source):
    assert breaches_of_messages(source) == []


def test_a_bare_tensor_is_found():
    assert len(breaches_of_tensor("from torch import Tensor, nn")) == 1
    assert breaches_of_tensor("import torch\nfrom torch import nn\nx: torch.Tensor") == []


@pytest.mark.parametrize("docstring", ["See `Layer.output`.", "See the class.", "As `f`.", "As above."])
def test_a_docstring_that_only_points_is_found(docstring):
    assert len(breaches_of_docstrings(f'class C:\n    def f(self):\n        """{docstring}"""')) == 1
    assert len(breaches_of_docstrings(f'def f():\n    """{docstring}"""')) == 1


def test_a_docstring_that_says_something_is_let_through():
    assert breaches_of_docstrings('def f():\n    """As `g`, in place."""') == []


def test_only_public_methods_need_docstrings():
    source = "class C:\n    def f(self): ...\n    def _g(self): ...\n    def __len__(self): ...\nclass _D:\n    def f(self): ..."
    assert undocumented(source) == ["C.f"]


def test_an_override_needs_no_docstring():
    assert overrides("lowrank.adapters.methods.lora", "Lora.shapes")
    assert overrides("lowrank.quantisers.decoder", "Dense.rows")  # a protocol's
    assert not overrides("lowrank.weights.arithmetic.carriers", "Carriers.compare")


@pytest.mark.parametrize(
    ("source", "users", "count"),
    [
        ("def f(): ...", {}, 1),
        ("def f(): ...", {("lowrank.x", "f"): {"lowrank/x.py"}}, 1),
        ("def f(): ...", {("lowrank.y", "f"): {"lowrank/z.py"}}, 1),
        ("class C: ...", {}, 1),
        ("def _f(): ...", {("lowrank.x", "_f"): {"lowrank/y.py"}}, 1),
        ("def _f(): ...", {("lowrank.x", "_f"): {"tests/test_x.py"}}, 0),
        ("def f(): ...", {("lowrank.x", "f"): {"lowrank/y.py"}}, 0),
        ("def f(): ...", {("lowrank.x", "f"): {"tests/test_x.py"}}, 0),
        ("class C: ...\ndef f() -> list[C]: ...", {("lowrank.x", "f"): {"lowrank/y.py"}}, 0),
        ("class C: ...\ndef _f() -> C: ...", {}, 1),
    ],
)
def test_names_are_private_where_nobody_else_uses_them(source, users, count):
    assert len(breaches_of_privacy("lowrank.x", source, users)) == count


def test_who_takes_a_name_is_seen_however_it_does():
    source = """
from lowrank.weights.files import names
from lowrank.data import load_examples as load
import lowrank.models as base
names.placements()
base.load_model()
monkeypatch.setattr("lowrank.paths.expanded", None)
FILES = {"torchao": "TorchAo"}
"""
    assert {
        ("lowrank.weights.files.names", "placements"),
        ("lowrank.data", "load_examples"),
        ("lowrank.models", "load_model"),
        ("lowrank.paths", "expanded"),
        ("", "TorchAo"),
    } <= names_taken(source)


@pytest.mark.parametrize(
    "source",
    ["", '"""A room."""\ndef f(): ...', '"""A room."""\nfrom lowrank.data import load_examples as load_examples'],
)
def test_an_init_of_another_form_is_found(source):
    assert len(breaches_of_init(source)) == 1
