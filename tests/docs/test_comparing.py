"""The commands of docs/compare.md run as they stand, on small models and made texts."""

import json
import random
import re
import statistics

import pytest
from pages import execute, small_recipe, text

PAGE = "docs/compare.md"
SCHEMES, LENGTHS = ("kerple", "dape-kerple"), (64, 128, 256, 512, 1024)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return the folder in which the commands of the page were given."""
    folder, chosen = tmp_path_factory.mktemp("compare"), random.Random(0)
    for split, count in {"train": 1, "validation": 1, "test": 2}.items():
        (folder / "texts" / split).mkdir(parents=True)
        for number in range(count):
            words = " ".join(chosen.choice(("one", "two", "three")) for _ in range(400))
            (folder / "texts" / split / f"{number}.txt").write_text(words)
    small_recipe("demo.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        execute(PAGE)
    return folder


def evaluation(desk, scheme, seed, protocol="last"):
    file = desk / "runs" / "demo" / f"{scheme}-{seed}" / "evaluation" / f"{protocol}.json"
    return json.loads(file.read_text())


def test_the_table_has_mean_and_deviation_over_seeds(desk):
    table = (desk / "table.md").read_text()
    for scheme in SCHEMES:
        (row,) = re.findall(rf"^\| {scheme} \| 3 \| (.*) \|$", table, flags=re.MULTILINE)
        measured = [evaluation(desk, scheme, seed)["measurements"] for seed in range(3)]
        for place, (length, cell) in enumerate(zip(LENGTHS, row.split(" | "), strict=True)):
            values = [each[place]["perplexity"] for each in measured]
            assert {each[place]["length"] for each in measured} == {length}
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            assert cell == f"{mean:,.2f} ± {deviation:,.2f}"


def test_every_protocol_scores_the_contexts_that_the_page_says(desk):
    least = {"last": 64, "sliding-64": 64, "non_overlapping": 1}  # 64 is the shortest length
    for name, shortest in least.items():
        for each in evaluation(desk, "kerple", 0, name)["measurements"]:
            contexts, longest = each["contexts"], each["length"]
            first = 1 if shortest == 1 else longest - shortest + 1
            assert (contexts[0][0], contexts[-1][1]) == (first, longest)


def test_figures_and_reports_are_there(desk):
    assert (desk / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    for report in ("report.html", "by-context.html"):
        assert "<svg" in (desk / report).read_text() or "image/svg" in (desk / report).read_text()


def test_the_tables_on_the_page_are_those_of_the_results():
    measured = text("results/demo/table.md")
    rows = re.findall(r"^\|.*(?:±|%|\d\.\d).*\|$", text(PAGE), flags=re.MULTILINE)
    assert len(rows) == 5
    assert all(row in measured for row in rows)
