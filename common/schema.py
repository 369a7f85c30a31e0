"""
What JSON from a file must look like, and tensors from a file, before anything is done with them.

    check({"rows": 3}, {"rows": COUNT, "words?": [TEXT]}, "data/x/dataset.json")
"""
import json
import math

# a schema is one of these (test, words), a dict of schemas (in which a key ending with "?" may be absent, and others do
# not matter), or a list with the schema of all entries
COUNT = (lambda v: type(v) is int and 0 <= v < 2 ** 53, "a whole number from 0 on")
SIZE = (lambda v: type(v) is int and 1 <= v <= 2 ** 16, "a whole number from 1 to 65,536")
NUMBER = (lambda v: type(v) in (int, float) and math.isfinite(v), "a finite number")
TEXT = (lambda v: isinstance(v, str), "a text")
FLAG = (lambda v: isinstance(v, bool), "true or false")
TABLE = (lambda v: isinstance(v, dict), "an object")


def optional(schema):
    """Return a schema that null fits too."""
    return (lambda v: v is None or schema[0](v)), f"{schema[1]} or null"


def one_of(*values):
    return (lambda v: v in values), " or ".join(map(str, values))


def check(value, schema, where, field=""):
    """Raise ValueError, naming the file and the field, where a value does not fit its schema."""
    if isinstance(schema, dict):
        check(value, TABLE, where, field)
        for key, inner in schema.items():
            name = key.rstrip("?")
            if name in value:
                check(value[name], inner, where, f"{field}.{name}".lstrip("."))
            elif not key.endswith("?"):
                raise ValueError(f"{where}: {f'{field}.{name}'.lstrip('.')} is missing")
    elif isinstance(schema, list):
        check(value, (lambda v: isinstance(v, list), "a list"), where, field)
        for i, entry in enumerate(value):
            check(entry, schema[0], where, f"{field}[{i}]")
    elif not schema[0](value):
        raise ValueError(f"{where}: {field or 'it'} is {json.dumps(value)[:80]}: it must be {schema[1]}")


def check_tensors(module, tensors, where):
    """Raise ValueError if {name: tensor} are not, in their shapes, the parameters and buffers of a module.

    It may be built on the device "meta", without memory: what a file says of its own network may be anything.
    """
    wanted, found = ({name: tuple(t.shape) for name, t in given.items()} for given in (module.state_dict(), tensors))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{where}: tensor {name} has shape {found.get(name, 'none')}, where the network has "
                             f"{wanted.get(name, 'none of that name')}")
