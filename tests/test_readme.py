"""README says what the registries hold: its tables are generated, and its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_current():
    """Kills: a codec, add-on or optimizer without its row. `python docs/tables.py --write` makes them anew."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.filled(README) == README
    assert README.count("<!-- end -->") == len(tables.TABLES)


def test_links_and_commands_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for command in re.findall(r"^    (\./launch/\w+)", README, flags=re.M):
        assert (ROOT / command).stat().st_mode & 0o100, f"{command} cannot be started"
