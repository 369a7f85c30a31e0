"""
Settings of a script: its own defaults < a config file < the command line.

    python train.py config/tiny.py --batch_size=32 --compile --out runs/mine

A script keeps its settings as plain module-level assignments, each with a comment, and then calls configure(globals()).
A comment may state what values are allowed, in parentheses: "(>= 0, < 1)" or "(cosine | constant)". Numbers must be
finite in any case. A config file is a Python file of such assignments. An unknown name, a value of another type or one
out of range ends the script with one message, before anything heavy is imported or anything is written; --help prints
every setting with default and comment.
"""
import ast
import difflib
import functools
import importlib.util
import io
import math
import operator
import re
import sys
import tokenize
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FROM_DATA = ("latent_channels", "caption_dim")  # fields of the network's dataclass that the data decide
COMPARISONS = {">=": (operator.ge, "at least"), "<=": (operator.le, "at most"), ">": (operator.gt, "above"),
               "<": (operator.lt, "below")}
BOUND = r"([<>]=?) (-?[\d.e-]+)"
RANGE = re.compile(rf"\({BOUND}(?:, {BOUND})?\)")
CHOICE = re.compile(r"\((\w+(?: \| \w+)+)\)")


def configure(module, network=""):
    """Overwrite the settings in `module`, a script's globals(), from sys.argv; return them all as a dict.

    network names a dataclass, as "model.MicroDiTConfig", whose fields are settings too. They are in the dict alone.
    """
    script = Path(module["__file__"])
    sys.excepthook = functools.partial(end_in_one_line, script.name)
    try:
        if any(arg in ("--help", "-h") for arg in sys.argv[1:]):
            print_help(module.get("__doc__"), read_defaults(script))
            raise SystemExit(0)
        described = read_defaults(script)
        defaults = {name: default for name, (default, _) in described.items()}
        config_file, overrides = parse_command_line(sys.argv[1:], defaults)
        settings = defaults | (read_config(config_file, defaults) if config_file else {}) | overrides
        check(settings, described)
    except ValueError as error:
        raise SystemExit(f"{script.name}: {error}") from None
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(f"{script.name}: this Python ({sys.executable}) has no torch. Activate the environment, "
                         "`source .venv/bin/activate`, or pip install -r requirements.txt")
    module.update({name: value for name, value in settings.items() if name in module})
    return settings


def end_in_one_line(script, kind, error, traceback):
    """Show no traceback for Ctrl-C while the script still imports what it needs."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{script}: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def script_settings(script, config=None):
    """Return the settings of another script, its defaults overwritten by a config file. The script is not imported."""
    defaults = {name: default for name, (default, _) in read_defaults(ROOT / script).items()}
    return defaults | (read_config(config, defaults) if config else {})


def read_defaults(script):
    """Return {name: (default, comment)} of the assignments before the call of configure(), and of the fields of the
    dataclass that the call names."""
    source = Path(script).read_text(encoding="utf-8")
    comments, found = trailing_comments(source, 0), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and not node.targets[0].id.isupper():
            found[node.targets[0].id] = ast.literal_eval(node.value), comments.get(node.targets[0].id, "")
        elif isinstance(node, ast.If):
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            named = [k.value.value for call in calls for k in call.keywords if k.arg == "network"]
            fields = read_fields(*named[0].split(".")) if named else {}
            return found | {name: field for name, field in fields.items() if name not in FROM_DATA}
    return found


def read_fields(module, name):
    """Return {field: (default, comment)} of a dataclass in a file at the top."""
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    comments = trailing_comments(source, 4)
    (body,) = (n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    return {n.target.id: (ast.literal_eval(n.value), comments.get(n.target.id, "")) for n in body
            if isinstance(n, ast.AnnAssign)}


def check(settings, described):
    """Raise ValueError for a setting that is not finite or not what its comment allows; described: {name: (default,
    comment)}."""
    for name, value in settings.items():
        bounds, options = allowed(described[name][1])
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, float) and not math.isfinite(v):
                raise ValueError(f"{name} is {value}: it must be finite")
            if not all(COMPARISONS[sign][0](v, bound) for sign, bound in bounds):
                words = " and ".join(f"{COMPARISONS[sign][1]} {bound:g}" for sign, bound in bounds)
                raise ValueError(f"{name} is {value}: it must be {words}")
            if options and str(v) not in options:
                raise ValueError(f"{name} is {v!r}: it must be {' or '.join(options)}")


def allowed(comment):
    """Return ([(comparison, bound)], [option]) of what a comment allows."""
    bounds, options = RANGE.search(comment), CHOICE.search(comment)
    return ([(sign, float(bound)) for sign, bound in re.findall(BOUND, bounds.group())] if bounds else [],
            options.group(1).split(" | ") if options else [])


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
    print((doc or "").strip())
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
                raise ValueError(f"do not know what to do with '{arg}': settings are given as --name=value, and one "
                                 f"config file (.py) comes first{hint}")
            config_file = arg
            continue
        name, equals, text = arg[2:].partition("=")
        if name not in defaults:
            raise ValueError(unknown(name, defaults))
        texts = [text] if equals else []
        if not equals:  # the values that follow: several for a list, at most one otherwise
            many = isinstance(defaults[name], (tuple, list))
            while i < len(args) and not args[i].startswith("--") and (many or not texts):
                texts.append(args[i])
                i += 1
        overrides[name] = from_text(name, texts, defaults[name])
    return config_file, overrides


def from_text(name, texts, default):
    """Return a value of the default's type from the words of the command line."""
    if isinstance(default, (tuple, list)):
        example = default[0] if default else ""
        texts = [] if texts == [""] else texts
        return tuple(from_text(name, [t], example) for t in texts)
    if isinstance(default, bool):
        text = texts[0].lower() if texts else "true"
        if text in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return text in ("true", "1", "yes", "on")
    elif not texts:
        raise ValueError(f"--{name} needs a value ({type(default).__name__}, default {default!r})")
    else:
        try:
            return type(default)(texts[0])
        except ValueError:
            pass
    raise ValueError(f"--{name} is {texts[0]!r}: it must be {type_name(default)} like {default!r}")


def type_name(value):
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}.get(type(value), "a list")


def read_config(path, defaults):
    """Return the settings of a config file; ValueError names it, and the nearest setting to one that does not exist."""
    if not Path(path).is_file():
        configs = ", ".join(sorted(str(p) for p in Path("config").glob("*.py"))) or "none in config/"
        raise ValueError(f"no config file {path} (there are: {configs})")
    values = {"__file__": str(path)}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), values)
    except (Exception, SystemExit) as error:
        inside = error.__traceback__.tb_next
        line = getattr(error, "lineno", None) or (inside.tb_lineno if inside else "?")
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    settings = {}
    for name, value in values.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):  # modules that the file imported
            continue
        if name not in defaults:
            raise ValueError(f"{path}: {unknown(name, defaults)}")
        settings[name] = checked(path, name, value, defaults[name])
    return settings


def checked(path, name, value, default):
    """Return value if it is of the default's type; a whole number will do for a float, one text for a list of them."""
    if isinstance(default, (tuple, list)) and isinstance(value, str) and isinstance((*default, "")[0], str):
        return (value,)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return tuple(checked(path, name, v, default[0] if default else "") for v in value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{path}: {name} is {value!r}: it must be {type_name(default)} like {default!r}")
    return value
