"""DIRAC's job description language: `[ Executable = "run.sh"; InputData = {"LFN:/vo/a", "LFN:/vo/b"}; CPUTime = 3600; ]`.

Read here, and not by DIRAC's parser: that one cuts a text at a `;` between quotes, and never returns from some texts
with a `[` between quotes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from loadmaster.description import JobDescription
from loadmaster.dirac.dictionaries import from_dirac, to_dirac
from loadmaster.errors import InvalidJob

DEEPEST: Final = 16
"""So many brackets in brackets are nobody's job."""

_SPACE = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BARE = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^",;{}\[\]])+', re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")  # int() refuses thousands
_DECIMAL = re.compile(r"[+-]?([0-9]{1,30}\.[0-9]*|\.[0-9]+|[0-9]{1,30}(?=[eE]))([eE][+-]?[0-9]{1,2})?")
_UNREADABLE = re.compile(r'[";\[\]\n\\]')
"""What DIRAC's parser does not survive within a text, and what would be read as another text."""


def read_jdl(text: str) -> dict[str, Any]:
    """The words of a JDL text: strings, numbers, True and False, lists, and dictionaries of what is in brackets.

    The outer brackets may be left out. Expressions of the language come as the text they are. Raises `InvalidJob` that
    says in which line it cannot be understood.
    """
    reader = _Reader(text)
    words = reader.record(outer=True)
    reader.end()
    return words


def job_from_jdl(text: str) -> JobDescription:
    """The job of a JDL text. Raises `InvalidJob`."""
    return from_dirac(read_jdl(text))[0]


def job_to_jdl(job: JobDescription) -> str:
    """The JDL text of a job, in words that DIRAC's own parser reads as well.

    Raises `InvalidJob` that names what cannot be written: a word with a quote, a backslash, `;`, a bracket or a line end in
    it, and what DIRAC has no words for.
    """
    lines = [f"  {key} = {_written(key, value)};\n" for key, value in to_dirac(job)["Job"].items()]
    return f"[\n{''.join(lines)}]\n"


def _written(key: str, value: object) -> str:
    match value:
        case bool():
            return "True" if value else "False"
        case int() | float():
            return repr(int(value) if value == int(value) else value)  # DIRAC reads a CPUTime by int()
        case str():
            if found := _UNREADABLE.search(value):
                raise InvalidJob(f"{key}: DIRAC cannot read {found[0]!r} within a text of its JDL")
            return f'"{value}"'
        case list():
            if any(isinstance(item, str) and "," in item for item in value):
                raise InvalidJob(f"{key}: DIRAC cannot read a comma within an item of its JDL")
            return f"{{{', '.join(_written(key, item) for item in value)}}}"
        case _:
            raise InvalidJob(f"{key}: there are no words for it in DIRAC's JDL")


class _Reader:
    """A text and how far it has been read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def record(self, *, outer: bool = False) -> dict[str, Any]:
        bracketed = self._skip("[")
        if not bracketed and not outer:
            self._fail("'[' is expected")
        words: dict[str, Any] = {}
        while self._next() not in {"", "]"}:
            if self._skip(";"):
                continue
            found = _NAME.match(self._text, self._at)
            if found is None:
                self._fail("the name of an attribute is expected")
            self._at = found.end()
            if not self._skip("="):
                self._fail(f"'=' is expected after {found[0]}")
            words[found[0]] = self._value()
            if self._next() not in {";", "]", ""}:
                self._fail(f"';' is expected after the value of {found[0]}")
        if bracketed and not self._skip("]"):
            self._fail("']' is missing")
        return words

    def end(self) -> None:
        if self._next():
            self._fail("there is more after the end")

    def _value(self) -> Any:
        match self._next():
            case "{":
                return self._deeper(self._list)
            case "[":
                return self._deeper(self.record)
            case _:
                return self._plain()

    def _list(self) -> list[Any]:
        self._skip("{")
        items: list[Any] = []
        while not self._skip("}"):
            items.append(self._value())
            if not self._skip(",") and self._next() != "}":
                self._fail("',' or '}' is expected in a list")
        return items

    def _plain(self) -> Any:
        found = _BARE.match(self._text, self._at)
        if found is None or not found[0].strip():
            self._fail("a value is expected, or a quote is open")
        self._at = found.end()
        text = found[0].strip()
        if (string := _STRING.fullmatch(text)) is not None:
            return string[1].replace('\\"', '"')
        if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        if _INTEGER.fullmatch(text):
            return int(text)
        return float(text) if _DECIMAL.fullmatch(text) else text

    def _deeper(self, read: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            self._fail("too many brackets in brackets")
        value = read()
        self._depth -= 1
        return value

    def _next(self) -> str:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        return self._text[self._at : self._at + 1]

    def _skip(self, character: str) -> bool:
        if self._next() != character:
            return False
        self._at += 1
        return True

    def _fail(self, complaint: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        rest = self._text[self._at : self._at + 30].split("\n")[0]
        raise InvalidJob(f"JDL, line {line}: {complaint}, at {rest!r}")


def is_jdl(text: str) -> bool:
    """Whether a text looks like JDL, and not like JSON, which begins with a brace."""
    return re.match(r"\s*(\[\s*)?[A-Za-z_]\w*\s*=", text) is not None
