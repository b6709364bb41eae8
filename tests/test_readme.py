"""The README and the commands must not drift apart."""

import re

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("script", ["run.py", "eval.py"])
def test_every_flag_is_in_the_readme(command, script):
    flags = set(re.findall(r"--[a-z][a-z-]+", command(script, "--help").stdout.split("options:")[1])) - {"--help"}
    assert len(flags) > 8
    readme = (ROOT / "README.md").read_text()
    assert not [flag for flag in flags if not re.search(flag + r"(?![a-z-])", readme)]


def test_every_file_that_the_readme_links_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
