"""A small part of the campaign of `docs/reliability.md`: nothing in it ends wrongly."""

import re
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "campaign"
PARTS = "kills,two at once,damaged,hostile,nonsense"


def test_a_part_of_the_campaign_finds_nothing():
    words = [sys.executable, str(CAMPAIGN), "--parts", PARTS, "--every", "89"]
    done = subprocess.run(words, capture_output=True, text=True)
    rows = re.findall(r"^\| (.*?) \| .*? \| (\d+) \| .* \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert {part for part, _, _ in rows} == set(PARTS.split(","))
    assert sum(int(trials) for _, trials, _ in rows) > 40
    assert done.returncode == 0 and "FAULT" not in done.stderr, done.stdout + done.stderr
