"""Imports go one way: scripts -> rooms -> model.py and common/. No room imports a script, no script another."""
import ast

import pytest
from conftest import ROOT

ROOMS = ("common", "encoders", "pictures", "training", "sampling", "evaluation", "studies")
SHARED = ("model", "configurator")  # files at the top that rooms import
ALONE = {"model.py": ("torch", "math", "dataclasses"), "configurator.py": ()}  # what these may import; (): any library


def imports(source):
    """Return the names of the modules that a source imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def problems(sources):
    """Say what is wrong with the imports of {file: source}."""
    scripts = {f[:-3] for f in sources if "/" not in f} - set(SHARED)
    found, arrows = [], set()
    for file, source in sources.items():
        room = file.split("/")[0] if "/" in file else None
        for top in {module.split(".")[0] for module in imports(source)}:
            ours = top in (*ROOMS, *SHARED, *scripts)
            if file in ALONE and (ours or ALONE[file] and top not in ALONE[file]):
                found.append(f"{file} imports {top}")
            elif top in scripts:
                found.append(f"{file} imports the script {top}")
            elif room == "common" and top == "model":
                found.append(f"{file} knows the model")
            elif room and top in ROOMS and top != room:
                arrows.add((room, top))
    while arrows:  # take away rooms that import no other, until none is left
        leaves = {room for _, room in arrows} - {room for room, _ in arrows}
        if not leaves:
            return found + [f"rooms import each other in a circle: {sorted(arrows)}"]
        arrows = {arrow for arrow in arrows if arrow[1] not in leaves}
    return found


@pytest.fixture(scope="module")
def sources():
    """{file: source} of the scripts and the rooms"""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_imports_go_one_way(sources):
    assert {f.split("/")[0] for f in sources if "/" in f} == set(ROOMS) and "train.py" in sources
    assert problems(sources) == []


@pytest.mark.parametrize("file, line, words", [
    ("training/log.py", "import train", "imports the script train"),
    ("eval_fid.py", "from sample import load", "imports the script sample"),
    ("common/files.py", "from pictures.prepared import Dataset", "in a circle"),
    ("common/plot.py", "def f():\n    import model", "knows the model"),
    ("model.py", "from common import files", "model.py imports common"), ("model.py", "import os", "imports os")])
def test_an_import_that_is_turned_round_is_found(sources, file, line, words):
    assert any(words in problem for problem in problems(sources | {file: sources[file] + f"\n{line}\n"}))
