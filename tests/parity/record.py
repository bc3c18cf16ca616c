"""Make the record anew: `python tests/parity/record.py [part of a case's name]`. What DIRAC answers to every case is written
to `record.json`, beside this file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES
from environment import ask_all, dirac_python

RECORD = Path(__file__).with_name("record.json")


def load() -> dict[str, list[dict[str, Any]]]:
    """What DIRAC has answered, by the names of the cases: one answer, or several where it answers by chance."""
    found: dict[str, list[dict[str, Any]]] = json.loads(RECORD.read_text())
    return found


def answer_to(case: Mapping[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer that is compared with ours: of a race, the end that the case is about."""
    choose = max if case.get("race") == "kept" else min
    return choose(answers, key=lambda answer: len(answer["hooks"]))


def main(part: str = "", *, asked: int = 1, asked_of_racing: int = 8) -> None:
    """Ask DIRAC, and keep its answers."""
    record = load() if RECORD.exists() else {}
    cases = [case for name, case in CASES.items() if part in name]
    python = dirac_python()
    for number in range(asked_of_racing):
        found = ask_all(python, [case for case in cases if number < asked or case.get("race")])
        for name, answer in found.items():
            known = record.setdefault(name, []) if number else record.update({name: []}) or record[name]
            if answer not in known:
                known.append(answer)
        if racing := [name for name, known in record.items() if len(known) > 1 and not CASES[name].get("race")]:
            sys.exit(f"answered by chance, and not declared to: {racing}")
    lines = []
    for name in CASES:
        answers = sorted(record[name], key=json.dumps)
        lines.append(f"{json.dumps(name)}: [{(',' + chr(10) + '  ').join(map(json.dumps, answers))}]")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print({name: len(record[name]) for name in record if len(record[name]) > 1})


if __name__ == "__main__":
    main(*sys.argv[1:])
