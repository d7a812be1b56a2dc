"""The metrics and labels that a PromQL expression names, by tokens, without its grammar."""

import re
from collections.abc import Iterator

WORDS = {
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "atan2",
    "inf",
    "nan",
}
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
MATCHERS = re.compile(r"\{([^}]*)\}")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')


def labels(expression: str) -> set[str]:
    """Return the labels that the expression groups by or matches."""
    plain = STRING.sub('""', expression)
    grouped = {
        name.strip()
        for match in GROUPING.findall(plain)
        for name in match.split(",")
        if name.strip()
    }
    matched = {
        re.split(r"[=!~]", one)[0].strip()
        for match in MATCHERS.findall(plain)
        for one in match.split(",")
        if one.strip()
    }
    return grouped | matched


def metrics(expression: str) -> Iterator[str]:
    """Return the metrics: identifiers that are no function, aggregation, label or keyword."""
    plain = MATCHERS.sub("", GROUPING.sub("", STRING.sub('""', expression)))
    plain = re.sub(r"\[[^\]]*\]", "", plain)
    for match in re.finditer(r"(?<![\w.$:])[a-zA-Z_:][\w:]*", plain):
        rest = plain[match.end() :].lstrip()
        if not rest.startswith("(") and match[0].lower() not in WORDS:
            yield match[0]
