"""Each case runs on one of the three backends, in turn; in the long run on all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the other two backends of a case to the long run."""
    ours = [item for item in items if item.path.parent == HERE and getattr(item, "callspec", None) is not None]
    cases = list(dict.fromkeys(name for item in ours if (name := item.callspec.params.get("name")) is not None))  # type: ignore[attr-defined]
    for item in ours:
        name = item.callspec.params.get("name")  # type: ignore[attr-defined]
        backend = next((number for number, each in enumerate(("asyncio", "uvloop", "trio")) if each in item.name), None)
        if name is not None and backend is not None and cases.index(name) % 3 != backend:
            item.add_marker(pytest.mark.long)
