"""Examples and the README's tour run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("command", "says"),
    [(["examples/attention.py", "--lengths", "1024"], "1024 tokens: full")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_example(command: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_tour_of_the_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        smaller = block.replace("4096, 128", "4096, 16")  # the same geometry, quicker
        exec(compile(smaller, "README.md", "exec"), {})
