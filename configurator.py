"""
Settings of a script: its own defaults < a config file < the command line.

    python train.py config/tiny.py --batch_size=32 --compile --out runs/mine

A script keeps its settings as plain module-level assignments, each with a comment, and then calls configure(globals()).
A comment may state in parentheses what is allowed: "(>= 0, < 1)" or "(cosine | constant)". A config file is a Python
file of such assignments. A mistake ends the script with one line, before torch is imported; --help lists the settings.
"""
import ast
import contextlib
import difflib
import importlib.util
import io
import math
import operator
import os
import re
import sys
import tokenize
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FROM_DATA = ("latent_channels", "caption_dim")  # fields of the network's dataclass that the data decide
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
BOUND = r"([<>]=?) (-?[\d.e-]+)"
RULE = re.compile(rf"\(({BOUND}(?:, {BOUND})?|\w+(?: \| \w+)+)\)")  # what a comment allows
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
COMMANDS = []  # those in the docstring of the config file that was read
WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def configure(module):
    """Overwrite the settings in `module`, a script's globals(), from sys.argv; return them all as a dict.

    The fields of model.MicroDiTConfig are settings of train.py, too. They are in the dict alone.
    """
    script = Path(module["__file__"])
    # no traceback for Ctrl-C while the script still imports what it needs
    sys.excepthook = lambda kind, *rest: sys.__excepthook__(kind, *rest) if kind is not KeyboardInterrupt else print(
        f"{script.name}: stopped", file=sys.stderr)
    try:
        described = read_defaults(script)
        if {"--help", "-h"} & {*sys.argv[1:]}:
            print_help(module["__doc__"], described)
            raise SystemExit(0)
        defaults = {name: default for name, (default, _) in described.items()}
        config_file, overrides = parse_command_line(sys.argv[1:], defaults)
        settings = defaults | (read_config(config_file, defaults) if config_file else {}) | overrides
        check(settings, described)
    except ValueError as error:
        raise SystemExit(f"{script.name}: {error}") from None
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(f"{script.name}: this Python ({sys.executable}) has no torch: `source .venv/bin/activate`, or "
                         "pip install -r requirements.txt")
    module.update({name: value for name, value in settings.items() if name in module})
    return settings


def script_settings(script, config=None):
    """Return the settings of another script, its defaults overwritten by a config file. The script is not imported."""
    defaults = {name: default for name, (default, _) in read_defaults(ROOT / script).items()}
    return defaults | (read_config(config, defaults) if config else {})


def read_defaults(script):
    """Return {name: (default, comment)} of a script's assignments in front of the `if` that calls configure()."""
    source = Path(script).read_text(encoding="utf-8")
    comments, settings = trailing_comments(source, 0), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If):  # in which configure() is called
            break
        if isinstance(node, ast.Assign) and not node.targets[0].id.isupper():
            name = node.targets[0].id
            settings[name] = ast.literal_eval(node.value), comments.get(name, "")
    fields = network_fields() if Path(script).name == "train.py" else {}
    return settings | {name: field for name, field in fields.items() if name not in FROM_DATA}


def network_fields():
    """Return {field: (default, comment)} of model.MicroDiTConfig, without importing it."""
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    comments = trailing_comments(source, 4)
    (body,) = (n.body for n in ast.parse(source).body if getattr(n, "name", "") == "MicroDiTConfig")
    return {n.target.id: (ast.literal_eval(n.value), comments.get(n.target.id, "")) for n in body
            if isinstance(n, ast.AnnAssign)}


def check(settings, described):
    """Raise ValueError for a setting that is not finite or not what its comment allows; see read_defaults()."""
    for name, value in settings.items():
        rule = RULE.search(described[name][1])
        bounds = re.findall(BOUND, rule[1]) if rule else ()
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, float) and not math.isfinite(v):
                raise ValueError(f"{name} is {value}: it must be finite")
            right = all(COMPARISONS[sign](v, float(bound)) for sign, bound in bounds)
            if rule and not (right if bounds else str(v) in rule[1].split(" | ")):
                raise ValueError(f"{name} is {value!r}: it must be {rule[1]}")


def trailing_comments(source, column):
    """Return {name: comment}: what follows an assignment in its line, and the lines of comment right below it."""
    comments, current = {}, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == column:
            current = token.string
        elif token.type == tokenize.COMMENT and current and token.start[1] > column:
            comments[current] = f"{comments.get(current, '')} {token.string.lstrip('# ')}".strip()
    return comments


def print_help(doc, defaults):
    print(doc.strip())
    print("\nSettings (--name=value or --name value; a first argument without dashes is a config file):\n")
    width = max(len(name) for name in defaults) + 2
    for name, (value, comment) in defaults.items():
        print(f"  --{name:{width}}{value!r:<24}  {comment}")


def unknown(name, defaults):
    near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
    return f"unknown setting '{name}': the nearest is '{near[0]}' (--help lists them all)"


def parse_command_line(args, defaults):
    """Return (config file or None, {name: value})."""
    config_file, overrides, i = None, {}, 0
    while i < len(args):
        arg, i = args[i], i + 1
        if not arg.startswith("--"):
            if config_file or overrides or not arg.endswith(".py"):
                hint = f". Did you mean --prompt \"{arg}\"?" if "prompt" in defaults else ""
                raise ValueError(f"do not know what to do with '{arg}': one config file (.py) comes first, then "
                                 f"--name=value{hint}")
            config_file = arg
            continue
        name, equals, text = arg[2:].partition("=")
        if name not in defaults:
            raise ValueError(unknown(name, defaults))
        texts, many = [text] if equals else [], isinstance(defaults[name], (tuple, list))
        while not equals and i < len(args) and not args[i].startswith("--") and (many or not texts):
            texts.append(args[i])
            i += 1
        if not texts and not many and not isinstance(defaults[name], bool):
            raise ValueError(f"--{name} needs a value, like {defaults[name]!r}")
        value = [text for text in texts if texts != [""]] if many else texts[0] if texts else True
        overrides[name] = typed("--", name, value, defaults[name])
    return config_file, overrides


def read_config(path, defaults):
    """Return the settings of a config file; ValueError names it, and the nearest setting to one that does not exist."""
    file = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)  # it may lie beside the scripts
    if not file:
        configs = ", ".join(sorted(f"config/{p.name}" for p in (ROOT / "config").glob("[!_]*.py")))
        raise ValueError(f"no config file {path} (there are: {configs})")
    values = {"__file__": str(path)}
    try:
        exec(compile(file.read_text(encoding="utf-8"), path, "exec"), values)
    except (Exception, SystemExit) as error:
        inside = error.__traceback__.tb_next
        line = getattr(error, "lineno", None) or (inside.tb_lineno if inside else "?")
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    settings = {}
    COMMANDS[:] = re.findall(r"^    (\S.*?)(?:  #.*)?$", values.get("__doc__") or "", re.M)
    for name, value in values.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):  # modules that the file imported
            continue
        if name not in defaults:
            raise ValueError(f"{path}: {unknown(name, defaults)}")
        settings[name] = typed(f"{path}: ", name, value, defaults[name])
    return settings


def typed(where, name, value, default):
    """Return value in the default's type: a text is read, a whole number will do for a float, one text for a list."""
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list, str)):
        values = (value,) if isinstance(value, str) else value
        return tuple(typed(where, name, v, (*default, "")[0]) for v in values)
    if isinstance(default, bool) and isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    elif isinstance(value, str) and value.startswith("~/"):  # as of --out=~/x, which no shell expands
        value = os.path.expanduser(value)
    elif isinstance(default, (int, float)) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = type(default)(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kind = TYPES.get(type(default), "a list")
        raise ValueError(f"{where}{name} is {value!r}: it must be {kind} like {default!r}")
    return value
