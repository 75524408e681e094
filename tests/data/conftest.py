import made
import pytest


@pytest.fixture
def sources(tmp_path):
    """Texts of every kind, with broken ones among them."""
    folder = tmp_path / "sources"
    (folder / "more").mkdir(parents=True)
    made.write_zst(folder / "a.jsonl.zst", made.texts(60, seed=1))
    lines = made.json_lines(made.texts(60, seed=2)).splitlines(keepends=True)
    lines[17] = b'{"text": "cut off\n'
    (folder / "b.jsonl").write_bytes(b"".join(lines))
    (folder / "more" / "latin.txt").write_bytes("é".encode("latin-1"))
    for n, text in enumerate(made.texts(20, seed=3, longest=4000)):
        (folder / "more" / f"{n}.md").write_bytes(text.encode())
    return folder
