"""What docs/jobs.md says of each field is what the code does."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from loadmaster import ComputingElement, JobDescription, Limits, Site
from loadmaster.description import CE_KEYS, DIRAC_KEYS, DIRAC_STAND_INS, InputFile, OutputFile
from loadmaster.storage.catalog import _SCHEMA
from loadmaster.units import bytes_of, seconds_of
from loadmaster.world import World

PAGE = (Path(__file__).parent.parent / "docs" / "jobs.md").read_text()

MODELS: Mapping[str, type[BaseModel]] = {
    "## A job": JobDescription,
    "### Inputs": InputFile,
    "### Outputs": OutputFile,
    "### Limits": Limits,
    "## A computing element": ComputingElement,
    "## A site": Site,
    "The table `[payload]`": World,
}
"""What begins the part of the page that has the table of a model."""

UNITS = {"seconds": seconds_of, "bytes": bytes_of, "second": bytes_of}


def rows(begins: str) -> dict[str, list[str]]:
    """The first table after a line: field -> what stands in the other cells."""
    _, _, rest = PAGE.partition(f"\n{begins}")
    assert rest, f"the page has no {begins!r}"
    table = re.search(r"^\| field .*\n\| ---.*\n((?:\|.*\n)+)", rest, re.MULTILINE)
    assert table is not None
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[1].splitlines()]
    return {first.strip("`"): others for first, *others in cells}


def fields() -> Iterator[Any]:
    for begins, model in MODELS.items():
        for name, field in model.model_fields.items():
            if name != "extra":
                yield pytest.param(begins, name, field, id=f"{model.__name__}.{name}")


@pytest.mark.parametrize(("begins", "name", "field"), [*fields()])
def test_each_field_is_there_with_its_default_and_what_it_means(begins: str, name: str, field: Any) -> None:
    *_, default, meaning = rows(begins)[name]
    assert len(meaning) > 2
    if field.default is PydanticUndefined:
        made_up = field.default_factory is not None
        assert default == ("needed" if not made_up else "made up" if name == "job_id" else "—")
    elif field.default in (None, (), "") or isinstance(field.default, BaseModel):
        assert default == "—"
    elif isinstance(field.default, bool):
        assert default == ("yes" if field.default else "no")
    elif isinstance(field.default, int | float):
        unit = UNITS.get(name.rpartition("_")[2], lambda text: text)
        value = int(default.strip("`"), 8) if name == "umask" else float(str(unit(default)))
        assert value == field.default
    else:
        several = field.default if isinstance(field.default, tuple) else (field.default,)
        assert default == ", ".join(f"`{each}`" for each in several)


@pytest.mark.parametrize("begins", MODELS)
def test_nothing_is_there_that_is_no_field(begins: str) -> None:
    assert rows(begins).keys() <= MODELS[begins].model_fields.keys()


@pytest.mark.parametrize(
    ("begins", "keys", "stand_ins"),
    [("## A job", DIRAC_KEYS, DIRAC_STAND_INS), ("## A computing element", CE_KEYS, {})],
)
def test_each_field_has_the_keys_of_dirac_that_count(
    begins: str, keys: Mapping[str, str], stand_ins: Mapping[str, tuple[str, ...]]
) -> None:
    for name, (key, *_) in rows(begins).items():
        wanted = [*filter(None, [keys.get(name)]), *stand_ins.get(name, ())]
        assert key == " or ".join(f"`{each}`" for each in wanted), name


def test_the_site_of_the_page_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "site.toml").write_text(example)
    site = Site.load(tmp_path / "site.toml")
    assert (site.storage_elements["DISK"], site.retry_seconds) == (f"file://{tmp_path}/se/disk", 2.0)


def test_the_catalog_has_the_tables_and_columns_of_the_page() -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_SCHEMA)
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [column[1] for column in database.execute(f"PRAGMA table_info({table})")]
            told = re.search(rf"`{table}` \(([^)]*)\)", PAGE)
            assert told is not None
            assert [name for name in re.findall(r"`(\w+)`", told[1]) if name in columns] == columns
