"""What the README shows is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_readme_runs(example: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("b\na\n")
    program = f"from pathlib import Path\nhere = Path({str(tmp_path)!r})\n{example}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    if "sorted.txt" in example:
        assert (tmp_path / "results" / "sorted.txt").read_text() == "a\nb\n"
    if "changed their mind" in example:
        assert "Killed JobWasKilled: the user changed their mind" in done.stdout
