"""What the README and the pages of docs show is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
PAGES = {page.stem: page.read_text() for page in (HOUSE / "README.md", *sorted((HOUSE / "docs").glob("*.md")))}
EXAMPLES = {
    f"{name}-{number}": example
    for name, text in PAGES.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
}

(STORAGE,) = [example for example in EXAMPLES.values() if "StorageConformance" in example]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_a_page_runs(name: str, tmp_path: Path) -> None:
    """Those of the README as they are; the other pages have a directory `here`, with a file of words in it."""
    example = EXAMPLES[name]
    if not name.startswith("README"):
        (tmp_path / "words.txt").write_text("b\na\n")
        example = f"from pathlib import Path\nhere = Path({str(tmp_path)!r})\n{example}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    if "sorted.txt" in example:
        assert (tmp_path / "results" / "sorted.txt").read_text() == "loadmaster\npilot\n"
    if "changed their mind" in example:
        assert "Killed JobWasKilled: the user changed their mind" in done.stdout


def test_the_storage_of_the_pages_conforms_and_is_found_by_its_entry_point(tmp_path: Path) -> None:
    entry = re.search(r"```toml\n(\[project\.entry-points.*?)```", PAGES["staging"], re.DOTALL)
    assert entry is not None
    offered = tomllib.loads(entry[1])["project"]["entry-points"]["loadmaster.storages"]
    assert offered == {"pigeon": "pigeons:open_pigeons"}
    (tmp_path / "pigeons.py").write_text(STORAGE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nanyio_mode = auto\npython_files = pigeons.py\n")
    (tmp_path / "pigeons-1.0.dist-info").mkdir()
    (tmp_path / "pigeons-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeons\nVersion: 1.0\n")
    (tmp_path / "pigeons-1.0.dist-info" / "entry_points.txt").write_text(
        "[loadmaster.storages]\n" + "".join(f"{scheme} = {place}\n" for scheme, place in offered.items())
    )
    python = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    done = python([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "pigeons.py"])
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d+ passed", done.stdout, re.MULTILINE), done.stdout
    (tmp_path / "a").write_text("cargo")
    (tmp_path / "manifest").write_text('{"source": "a", "target": "pigeon://loft/a"}\n')
    (tmp_path / "site.toml").write_text("[storage.pigeon]\nlofft = 1\n")
    command = [sys.executable, "-c", "from loadmaster.cli import command; command()", "stage", "manifest"]
    assert python(command).returncode == 0
    done = python([*command, "--config", "site.toml"])
    assert done.returncode == 1
    assert done.stderr == "loadmaster: site.toml: [storage.pigeon] lofft: there is `loft`\n"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_leads_only_to_what_is_there(page: str) -> None:
    folder = HOUSE if page == "README" else HOUSE / "docs"
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page])
    assert [link for link in links if not (folder / link).exists()] == []
