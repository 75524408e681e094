"""A small part of the campaign of `docs/reliability.md`: nothing in it ends wrongly."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "campaign"


@pytest.mark.parametrize(
    ("parts", "every"), [("kills,two at once", 97), ("damaged,hostile,nonsense", 61)]
)
def test_a_part_of_the_campaign_finds_nothing(parts, every):
    words = [sys.executable, str(CAMPAIGN), "--parts", parts, "--every", str(every)]
    done = subprocess.run(words, capture_output=True, text=True)
    rows = re.findall(r"^\| (.*?) \| .*? \| (\d+) \| .* \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert {part for part, _, _ in rows} == set(parts.split(","))
    assert sum(int(trials) for _, trials, _ in rows) > 10
    assert done.returncode == 0 and "FAULT" not in done.stderr, done.stdout + done.stderr
