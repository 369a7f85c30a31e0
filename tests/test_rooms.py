"""Imports go one way: scripts -> rooms -> model.py and common/; no room imports a script, no script another."""

import ast

import pytest
from conftest import ROOT

ROOMS = ("common", "encoders", "pictures", "training", "sampling", "evaluation", "studies")
SHARED = ("model", "configurator")  # at the top, for everybody


def imports(source, lazily=True):
    """The modules that a source imports, with lazily also inside functions"""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def problems(sources):
    """What is wrong with the imports of {file: source}"""
    scripts = {f[:-3] for f in sources if "/" not in f} - set(SHARED)
    found, arrows = [], set()
    for file, source in sources.items():
        room = file.split("/")[0] if "/" in file else None
        if file in ("model.py", "configurator.py"):  # model.py hands the released names on to encoders, when asked
            ours = [m for m in imports(source, lazily=False) if m.split(".")[0] in (*ROOMS, *SHARED, *scripts)]
            found += [f"{file} imports {m}" for m in ours]
            continue
        for module in imports(source):
            top = module.split(".")[0]
            if top in scripts:
                found.append(f"{file} imports the script {top}")
            if room and top in ROOMS and top != room:
                arrows.add((room, top))
    while arrows:  # take away rooms that import no other, until none is left
        leaves = {room for _, room in arrows} - {room for room, _ in arrows}
        if not leaves:
            return found + [f"rooms import each other in a circle: {sorted(arrows)}"]
        arrows = {arrow for arrow in arrows if arrow[1] not in leaves}
    return found


def repository():
    """{file: source} of the scripts and the rooms"""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_imports_go_one_way():
    sources = repository()
    assert {f.split("/")[0] for f in sources if "/" in f} == set(ROOMS) and "train.py" in sources
    assert problems(sources) == []


@pytest.mark.parametrize("file, line, words", [
    ("training/log.py", "import train", "imports the script train"),
    ("eval_fid.py", "from sample import load", "imports the script sample"),
    ("common/files.py", "from training.dataset import Dataset", "in a circle"),
    ("encoders/vae.py", "def f():\n    from sampling import pipeline", "in a circle"),
    ("model.py", "from common import files", "model.py imports common")])
def test_an_import_that_is_turned_round_is_found(file, line, words):
    sources = repository()
    assert any(words in problem for problem in problems(sources | {file: sources[file] + f"\n{line}\n"}))


def test_nothing_is_too_long():
    """Files up to 420 lines but for the network and the drawn set; functions up to 50, with up to 6 positional
    parameters"""
    for file, source in repository().items():
        assert source.count("\n") <= {"model.py": 600, "pictures/shapes.py": 520}.get(file, 420), file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                given = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
                assert node.end_lineno - node.lineno < 50 and len(given) <= 6, f"{file}: {node.name}"
