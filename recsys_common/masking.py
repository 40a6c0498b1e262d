"""What must not be read in a log, a notebook or a file of results? Passwords, keys and tokens, which become marks.

    masked("cloning https://me:hunter2hunter2@example.com")   # cloning https://me:[masked: password]@example.com
    masked({"api_key": "abcdef123", "rows": 5})               # {"api_key": "[masked: api_key]", "rows": 5}

A mark says what was there; what is masked stays as it is when masked again. This is a last net for what has slipped in,
known by its shape or by the name before it: a password that stands alone in a text looks like any word. (The packages
that look for credentials report files and lines for a person to judge; none of them replaces what it found.)

Needs: nothing else.
"""

from __future__ import annotations

import functools
import logging
import re

# What has a shape of its own. Of a pattern with a group, the group alone is masked.
SHAPES = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"(?:(?!-----)[A-Za-z0-9+/=\s\\:,.-])*(?:-----END [A-Z ]*KEY-----)?",
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "Google OAuth token": r"\bya29\.[0-9A-Za-z_.-]{10,}|\b1//0[0-9A-Za-z_-]{20,}",
    "Google OAuth secret": r"\bGOCSPX-[0-9A-Za-z_-]{20,}",
    "AWS key": r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA)[0-9A-Z]{16}\b",
    "GitHub token": r"\bgh[pousr]_[0-9A-Za-z]{30,}|\bgithub_pat_[0-9A-Za-z_]{22,}",
    "Hugging Face token": r"\bhf_[0-9A-Za-z]{30,}",
    "Slack token": r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}",
    "JSON web token": r"\beyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]+",
    "authorization": r"\b(?i:bearer|basic)[ ]+([0-9A-Za-z+/_.~-]{16,}=*)",
    "password": r"://[^\s/:@\"'\\]*:([^\s/@\"'\\]+)@",
}
SHAPES = {what: re.compile(pattern) for what, pattern in SHAPES.items()}
# What has a telling name before it, which may be the end of a longer one: DB_PASSWORD, aws_secret_access_key.
NAME = (
    r"(?P<name>[\w.-]*?(?:password|passwd|pwd|passphrase|secret|token|credentials?|"
    r"(?:api|access|private|secret)[_-]?key(?:[_-]id)?))"
)
BARE = r"[^\s\"'\\,;&(){}\[\]<>]{6,}+(?![\[(.])"  # not code such as tokens[0]
ASSIGNED = [
    # name = "value", "name": "value"; the quotes may be escaped, as in JSON in JSON
    rf"(?<![\w.-]){NAME}\\*[\"']?\s*(?::\s*\w+\s*)?[=:]\s*(?P<quote>\\*[\"'])(?!(?P=quote))"
    r"(?P<value>[^\n]*?[^\n\\])(?=(?P=quote))",
    rf"(?<![\w.-]){NAME}(?:\s*=\s*|:[ ]*)(?P<value>{BARE})",  # NAME=value, name: value
    rf"(?<![\w.-])--{NAME}[ ]+(?P<value>(?!-){BARE})",  # --name value
]
ASSIGNED = [re.compile(pattern, re.IGNORECASE) for pattern in ASSIGNED]
NO_SECRET = re.compile(r"(?i)none|null|false|string|\$.*|\[masked: .*|.{0,3}", re.DOTALL)


def masked(content):
    """Text with marks where credentials were; or a tree of JSON whose strings are masked.

    Args:
      content: str, or dicts, lists and plain values. Of a dict, a string under a telling name is masked whole.

    Returns:
      The same kind of thing; numbers, booleans and None as they are.
    """
    if isinstance(content, dict):
        return {key: _named(key, value) if isinstance(value, str) else masked(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [masked(value) for value in content]
    if not isinstance(content, str):
        return content
    for what, pattern in SHAPES.items():
        content = pattern.sub(functools.partial(_marked, group=pattern.groups, what=what), content)
    for pattern in ASSIGNED:
        content = pattern.sub(_assigned, content)
    return content


class Masked(logging.Formatter):
    """A log without credentials, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return masked(super().format(record))


def _named(key: str, value: str) -> str:
    secret = re.fullmatch(NAME, str(key), re.IGNORECASE) and not NO_SECRET.fullmatch(value)
    return f"[masked: {key}]" if secret else masked(value)


def _marked(found: re.Match, group: int, what: str) -> str:
    whole, begin = found[0], found.start()
    return f"{whole[: found.start(group) - begin]}[masked: {what}]{whole[found.end(group) - begin :]}"


def _assigned(found: re.Match) -> str:
    if NO_SECRET.fullmatch(found["value"]) or "[masked: " in found["value"]:
        return found[0]
    return _marked(found, found.re.groupindex["value"], found["name"])
