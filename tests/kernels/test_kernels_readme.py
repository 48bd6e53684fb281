"""Every example of kernels/README.md runs as it is printed, on its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "kernels" / "README.md"
EXAMPLES = re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", [pytest.param(code, id=title) for title, code in EXAMPLES])
def test_example_runs(code: str) -> None:
    scope: dict[str, object] = {}
    exec(code, scope)
    assert any(name in scope for name in ("loss", "center", "low", "crops"))


def test_every_chapter_with_code_is_found() -> None:
    assert len(EXAMPLES) == README.read_text().count("```python") == 6
