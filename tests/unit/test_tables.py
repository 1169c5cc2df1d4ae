"""Tables in files: what they give, row by row, and what is said of every row that cannot be used."""

import json
import pickle
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from coeft.data._tables import read_table
from coeft.errors import UserError

COLUMNS = {"text": "data.input", "label": "data.label"}


def table(tmp_path: Path, name: str, data: str | bytes, **options):
    """Text and label of a file with these contents; a text must not be empty."""
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)

    def visit(record):
        if not str(record["text"]).strip():
            raise ValueError("column 'text' is empty")
        return record["label"]

    return read_table(path, COLUMNS, {"text": "text"}, visit, **options)


def texts(found) -> list[str]:
    return [row["text"] for row in found.rows]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_csv_with_quotes_breaks_and_empty_lines(tmp_path, mark, end, last):
    lines = ["text,label,more", '"a, ""b"""', "x", '"two', 'lines",2,', "", "é漢,3,y"]
    lines = [lines[0], '"a, ""b""",1,x', *lines[3:]]
    data = mark + end.join(lines).encode() + (end.encode() if last else b"")
    found = table(tmp_path, "a.csv", data)
    assert texts(found) == ['a, "b"', f"two{end}lines", "é漢"]
    assert found.values == ["1", "2", "3"]
    assert list(found.names) == ["a.csv:2", "a.csv:3", "a.csv:6"]  # the lines of an editor
    assert found.rows[2] == {"text": "é漢"} and found.rows[0] == {"text": 'a, "b"'}  # in any order
    assert pickle.loads(pickle.dumps(found.rows))[1]["text"] == f"two{end}lines"


def test_the_same_rows_from_every_format(tmp_path):
    rows = [{"text": f'words, number\t{n}\n"quoted" ‘’', "label": str(n % 3)} for n in range(50)]
    quoted = [[cell.replace('"', '""') for cell in (row["text"], row["label"])] for row in rows]
    csv = "text,label\n" + "".join(f'"{text}","{label}"\n' for text, label in quoted)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=7)
    found = [
        table(tmp_path, "a.csv", csv),
        table(tmp_path, "a.tsv", csv.replace("text,label", "text\tlabel").replace('","', '"\t"')),
        table(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row) for row in rows)),
        read_table(tmp_path / "p.parquet", COLUMNS, {"text": "text"}, lambda record: record["label"]),
    ]
    for one in found:
        assert texts(one) == [row["text"] for row in rows]
        assert one.values == [row["label"] for row in rows]
        assert [one.rows[n]["text"] for n in (49, 0, 13)] == [rows[n]["text"] for n in (49, 0, 13)]
    assert found[3].names[12] == "p.parquet:13" and found[2].names[12] == "a.jsonl:25"


@pytest.mark.parametrize(
    ("name", "data", "problems"),
    [
        (
            "empty.csv",
            "text,label\na,1\n  ,2\n,3\n",
            ["empty.csv:3: column 'text' is empty", "empty.csv:4: column 'te"],
        ),
        (
            "many.csv",
            "text,label\na,b,3\nok,1\n",
            ["many.csv:2: 3 cells, the header has 2; a cell with a comma in it is"],
        ),
        (
            "many.tsv",
            "text\tlabel\na\tb\t3\nok\t1\n",
            ["many.tsv:2: 3 cells, the header has 2; a cell with a tab in it"],
        ),
        ("few.csv", "text,label\nok,1\nonly\n", ["few.csv:3: 1 cell, the header has 2"]),
        (
            "quote.csv",
            'text,label\nok,1\n"a,2\nb,3\n',
            ['quote.csv:3: a quote (") is opened and never closed (lines 3 to 4)'],
        ),
        (
            "after.csv",
            'text,label\n"a\nb"c,2\nok,3\n',
            ['after.csv:2: text follows the quote (") that closes a cell (lines'],
        ),
        (
            "latin.csv",
            b"text,label\nok,1\ncaf\xe9,2\n",
            ["latin.csv:3: not UTF-8: byte 0xe9 at byte 4 of the line; save"],
        ),
        (
            "in.csv",
            b'text,label\nok,1\n"a\ncaf\xe9",2\n',
            ["in.csv:3: line 4: not UTF-8: byte 0xe9 at byte 4 of the line"],
        ),
        (
            "broken.jsonl",
            '{"text": "a", "label": 1}\n\n{"text":\n',
            ["broken.jsonl:3: broken JSON: Expecting value at column 9"],
        ),
        (
            "list.jsonl",
            '[{"text": "a", "label": 1}]\n{"text": "a", "label": 1}',
            ["list.jsonl:1: holds a list, not an object such"],
        ),
        (
            "open.jsonl",
            '[\n{"text": "a", "label": 1}\n]\n',
            ["open.jsonl:1: begins a JSON list; a .jsonl file has one obj", "open.jsonl:3: b"],
        ),
        (
            "kinds.jsonl",
            '7\n"x"\nnull\ntrue\n{"text": "a", "label": 1}',
            [f"kinds.jsonl:{n}: holds " for n in (1, 2, 3, 4)],
        ),
        (
            "key.jsonl",
            '{"text": "a", "label": 1}\n{"txt": "a"}',
            ["key.jsonl:2: no key 'text' (data.input); did you mean txt?; no key 'label' (da"],
        ),
        (
            "latin.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "\xe9"}',
            ["latin.jsonl:2: not UTF-8: byte 0xe9 at byte 11 of the line"],
        ),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, name, data, problems):
    with pytest.raises(UserError) as caught:
        table(tmp_path, name, data)
    lines = str(caught.value).splitlines()
    count = (
        f"{len(problems)} row{'s' * (len(problems) > 1)} of {tmp_path / name} cannot be used; repair or remove, or set"
    )
    assert lines[0].startswith(count) and len(lines) == 1 + len(problems)
    for line, problem in zip(lines[1:], problems, strict=True):
        assert line.startswith(f"  {problem}")
    skipped = table(tmp_path, name, data, on_error="skip")
    assert [line.strip() for line in lines[1:]] == skipped.bad
    assert len(skipped.values) == len(skipped.rows) == len(skipped.names) >= 1
    assert all(text.strip() for text in texts(skipped))


def test_all_bad_rows_are_counted_and_ten_named(tmp_path):
    data = "text,label\n" + "ok,1\n,2\n" * 25
    with pytest.raises(UserError) as caught:
        table(tmp_path, "a.csv", data)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("25 rows of ") and len(lines) == 12
    assert lines[1].startswith("  a.csv:3:") and lines[10].startswith("  a.csv:21:") and lines[11] == "  and 15 more"
    assert len(table(tmp_path, "a.csv", data, on_error="skip").bad) == 25


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", "", "data.path={path}: the file is empty"),
        ("a.csv", "\n\n", "{path}: the file is empty"),
        ("a.csv", "text,label\n", "{path}: the table has no rows"),
        ("a.jsonl", "\n", "{path}: the table has no rows"),
        ("a.csv", "txt,lable\na,1\n", "{path} has no column 'text' (data.input); did you mean txt?"),
        ("a.csv", "txt,lable\na,1\n", "{path} has no column 'label' (data.label); did you mean lable?"),
        ("a.jsonl", '{"txt": "a"}\n{"txt": "b"}\n', "{path} has no column 'text' (data.input); did you mean txt?"),
        ("a.csv", "text;label\na;1\n", "(the header is one cell with ';' in it: separate the cells by commas)"),
        ("a.csv", "text,text,label\na,b,1\n", "{path}:1: the header names 'text' twice"),
        ("a.csv", b"\xff\xfet\x00e\x00", "{path}:1: the file is in UTF-16; save it as UTF-8"),
        ("a.txt", "text,label\na,1\n", "data.path={path}: not a file of .csv, .tsv, .jsonl, .parquet"),
        ("a.parquet", "text,label\na,1\n", "{path}: not a Parquet file, or a damaged one"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, data, message):
    for on_error in ("raise", "skip"):
        with pytest.raises(UserError, match=re.escape(message.format(path=tmp_path / name))):
            table(tmp_path, name, data, on_error=on_error)


def test_no_such_file_and_folders(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\na,1\n")
    with pytest.raises(UserError, match="review.csv: no such file; did you mean reviews.csv?"):
        read_table(tmp_path / "review.csv", COLUMNS, {"text": "text"}, dict)
    with pytest.raises(UserError, match="data.splits.test=.* is a folder; name a file of .csv"):
        read_table(tmp_path, COLUMNS, {"text": "text"}, dict, key="data.splits.test")
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"], "label": [1]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="p.parquet has no column 'text' .*did you mean txt"):
        read_table(tmp_path / "p.parquet", COLUMNS, {"text": "text"}, dict)


def test_a_cell_may_be_long(tmp_path):
    long = "word " * 100_000
    found = table(tmp_path, "a.csv", f"text,label\n{long},1\n")
    assert texts(found) == [long]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    found = table(tmp_path, "a.csv", "text,label\na,1\nb,2\n")
    (tmp_path / "a.csv").write_text("text,label\nlonger,1\nb,2\n")
    with pytest.raises(UserError, match="was changed while it was read"):
        found.rows[1]


def test_the_texts_do_not_stay_in_memory(tmp_path):
    import tracemalloc

    data = "text,label\n" + ("x" * 10_000 + ",1\n") * 2_000  # 20 MB
    (tmp_path / "a.csv").write_text(data)
    del data
    tracemalloc.start()
    found = read_table(tmp_path / "a.csv", COLUMNS, {"text": "text"}, lambda record: 1)
    assert sum(len(row["text"]) for row in found.rows) == 20_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
