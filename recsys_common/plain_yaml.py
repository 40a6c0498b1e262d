"""How does a tree of plain values become YAML, and come back the same?

    written({"rate": 1e-07, "name": "1e-3"})      # rate: 1.0e-07, name: '1e-3'
    read("rate: 1e-3")                            # {"rate": 0.001}; PyYAML itself says "1e-3"

Plain values are dicts, lists, strings, numbers, booleans and None. An unquoted word is what YAML 1.2 says: `1e-3` is a
number, `yes`, `1:30` and `2024-01-01` are strings. Two things differ: `010`, `0o17` and `0x1F`, of which YAML 1.1 and
1.2 make different numbers, are strings, and `100_000` is a number. What is written is read the same by YAML 1.1.

Needs: nothing else.
"""

from __future__ import annotations

import re

import yaml

# Unquoted words that are no strings.
SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",  # 100_000 too
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in (*SCALARS, "str", "seq", "map")
    }

    def construct_mapping(self, node, deep=False):
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return mapping


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    def ignore_aliases(self, data):
        return True


for _name, _pattern in SCALARS.items():
    for _class in (_Loader, _Dumper):  # what is no string when read is written with quotes where it is one
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)


def read(text: str):
    """The value that a YAML document holds; None if it is empty.

    Raises:
      ValueError: not YAML, more than one document, a key that occurs twice, or a tag of other than plain values.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError) as error:  # 9...9 of 5,000 digits; !!bool maybe
        raise ValueError(f"not YAML of plain values: {error}") from None


def written(tree) -> str:
    """YAML, with keys in the order of the dicts."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
