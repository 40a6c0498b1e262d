"""What is in a config, is it right, and how do two differ? The command line of config.py.

    python -m recsys_common.config show small                             # every field, with its meaning and default
    python -m recsys_common.config check run.yaml training.epochs=2       # its name, or all that is wrong with it
    python -m recsys_common.config diff small run.yaml
    python -m recsys_common.config schema matrix_factorization            # JSON Schema, for editors

Needs: config.py declared_features.py plain_yaml.py masking.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterator

from recsys_common.config import BY_SCALE, Config, differences
from recsys_common.declared_features import Features, Section
from recsys_common.masking import masked
from recsys_common.plain_yaml import written


def config(of: str, *overrides: str) -> Config:
    """The config of a YAML file or a scale, with overrides.

    Raises:
      ValueError, OSError: as `Config.load`.
    """
    return Config.default(of).override(*overrides) if of in BY_SCALE else Config.load(of, *overrides)


def _described(section: Section | Features, tree: dict, indent: str = "") -> Iterator[str]:
    """YAML with a comment above each field."""
    for name, value in section.items() if isinstance(section, Features) else section:
        if isinstance(value, Section | Features):
            yield f"{indent}{name}:"
            yield from _described(value, tree[name], indent + "  ")
        else:
            yield textwrap.indent(type(section).model_fields[name].description or "", f"{indent}# ", lambda line: True)
            yield textwrap.indent(written({name: tree[name]}), indent).rstrip("\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0, or 1 where something is wrong or two configs differ."""
    parser = argparse.ArgumentParser("python -m recsys_common.config", description=__doc__.partition("\n")[0])
    parser.add_argument("--allow-own-code", action="store_true", help="a config may name a module of yours")
    commands = parser.add_subparsers(dest="command", required=True)
    config_or_scale = f"a YAML file, or a scale: {', '.join(BY_SCALE)}"
    for name, purpose in (
        ("show", "print each field with its meaning"),
        ("check", "print the name of a config, or what is wrong with it"),
        ("diff", "compare two configs field by field"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("config", help=config_or_scale)
        if name == "diff":
            command.add_argument("other", help=config_or_scale)
        else:
            command.add_argument("overrides", nargs="*", help="path=value, such as model.embedding_dim=64")
    schema = commands.add_parser("schema", help="print the JSON Schema for editors")
    schema.add_argument("architecture", nargs="?", help="with the fields that it has in `model`")
    given = parser.parse_args(arguments)
    if arguments is None:  # from a shell
        os.environ["RECSYS_OWN_CODE"] = "1" if given.allow_own_code else os.environ.get("RECSYS_OWN_CODE", "0")

    try:
        if given.command == "schema":
            print(json.dumps(Config.json_schema(given.architecture), indent=1))
        elif given.command == "diff":
            found = differences(config(given.config), config(given.other))
            print("\n".join(f"{path}: {a!r} -> {b!r}" for path, a, b in found) or "the same")
            return int(bool(found))
        else:
            one = config(given.config, *given.overrides)
            print(one.name if given.command == "check" else "\n".join([f"# {one.name}", *_described(one, one.tree())]))
    except (ValueError, OSError) as error:
        print(masked(str(error)), file=sys.stderr)
        return 1
    return 0
