"""Rows come from many kinds of files; what cannot be one is named by file, row and field, or counted."""

import json
import sys

import pytest

from tidar import TidarError
from tidar.prompts import read_prompts
from tidar.sources import BadRows, HubSource, Reading, hub_source, local_files, read_rows

ROWS = [{"prompt": "a", "answer": "é"}, {"prompt": "b"}]


def written(path, rows=ROWS):
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    return path


def read(source, bad=None, how=None):
    return list(read_rows(source, bad or BadRows(), how))


@pytest.mark.parametrize(
    ("name", "places"),
    [("r.jsonl", ("line 1", "line 3")), ("r.json", ("row 1", "row 2")), ("r.parquet", ("row 1", "row 2"))],
)
def test_every_format_gives_the_same_rows(name, places, tmp_path):
    path = written(tmp_path / name)
    assert read(path) == [(f"{path}, {place}", row) for place, row in zip(places, ROWS, strict=True)]
    assert [row.fields for row in read(path, how=Reading(limit=1))] == ROWS[:1]


def test_a_json_file_may_hold_lines(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row.fields for row in read(path)] == ROWS


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert [row.fields["prompt"] for row in read(path)] == ["a\u2028b"]


def test_a_text_file_is_a_document_or_several_between_marks(tmp_path):
    (tmp_path / "one.txt").write_text("first\n\nsecond\n")
    (tmp_path / "two.txt").write_text("a <|endoftext|> b\n<|endoftext|>\nc\n\n<|endoftext|>\n")
    assert read(tmp_path / "one.txt") == [(str(tmp_path / "one.txt"), {"text": "first\n\nsecond\n"})]
    assert [row.fields["text"] for row in read(tmp_path / "two.txt")] == ["a <|endoftext|> b\n", "c\n\n"]
    assert read(tmp_path / "two.txt")[1].place.endswith("two.txt, document 2")


def test_folders_and_patterns_name_their_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    files = [written(tmp_path / "b.jsonl"), written(tmp_path / "sub" / "a.jsonl"), written(tmp_path / "c.json")]
    (tmp_path / "notes.md").write_text("# no data")
    assert local_files(tmp_path) == sorted(files)
    assert local_files(tmp_path / "*.jsonl") == files[:1]
    assert len(read(tmp_path)) == 6
    with pytest.raises(TidarError, match="no file matches"):
        read(tmp_path / "*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TidarError, match="no data files"):
        read(tmp_path / "empty")


BAD_LINES = [b'{"prompt": "ok"}', b"{", b"[1]", b'{"prompt": "\xe9"}', b'{"prompt": "fine"}']


def test_the_first_bad_row_is_the_error_and_with_skip_all_are_counted(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    with pytest.raises(TidarError, match=r"r.jsonl, line 2: not valid JSON \(.* at column \d\)"):
        read(path)
    bad = BadRows(skip=True)
    assert [row.fields["prompt"] for row in read(path, bad)] == ["ok", "fine"]
    assert bad.count == 3
    assert [error.split(", ")[1][:6] for error in bad.examples] == ["line 2", "line 3", "line 4"]
    assert bad.report().startswith("3 bad rows skipped, the first: ")
    assert BadRows().report() == ""


def test_a_broken_parquet_file_is_one_sentence(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "r.parquet").write_bytes(b"no table")
    with pytest.raises(TidarError, match=r"r.parquet: not readable as Parquet"):
        read(tmp_path / "r.parquet")


@pytest.mark.parametrize("name", ["r.parquet", "hf:some/set"])
def test_without_the_packages_the_error_says_what_to_install(name, tmp_path, monkeypatch):
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "r.parquet").write_bytes(b"")
    with pytest.raises(TidarError, match=r"pip install 'tidar\[train\]'"):
        read(name if name.startswith("hf:") else tmp_path / name)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("hf:openai/gsm8k:main:train", HubSource("openai/gsm8k", "main", "train")),
        ("hf:some/set", HubSource("some/set", None, "train")),
        ("hf:some/set:test", HubSource("some/set", None, "test")),
        ("hf:some/set:train[:10%]", HubSource("some/set", None, "train[:10%]")),
    ],
)
def test_addresses_of_hub_data_sets(address, parsed):
    assert hub_source(address) == parsed


@pytest.mark.parametrize("address", ["hf:", "hf:a:b:c:d", "hf:a::b"])
def test_bad_addresses_are_refused(address):
    with pytest.raises(TidarError, match="write hf:NAME"):
        hub_source(address)


def test_hub_rows_keep_their_place_and_drop_nulls(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list([{"prompt": "a", "text": None}, {"prompt": "b", "text": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("hf:some/set:main:test", how=Reading(limit=1, stream=True))
    assert rows == [("hf:some/set:main:test, row 1", {"prompt": "a"})]
    assert asked == [("some/set", "main", "test", True)]


def test_an_unreachable_hub_data_set_is_one_sentence():
    pytest.importorskip("datasets")
    with pytest.raises(TidarError, match=r"^hf:no/such-set: cannot be read as a data set") as error:
        read("hf:no/such-set")
    assert "\n" not in str(error.value)


SAID = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": "hi"}, "field 'messages' must be a list"),
        ({"messages": [SAID, {"role": "user"}]}, r"field 'messages\[1\]' has no 'content', but 'role'"),
        ({"messages": [{"role": "user", "content": 7}]}, r"field 'messages\[0\].content' must be a text, not int"),
        ({"conversations": [{"from": "human", "value": None}]}, r"field 'conversations\[0\].value' must be a text"),
        ({"prompt": [SAID, "hi"]}, r"field 'prompt\[1\]' must be a message"),
        ({"question": 3}, "no prompt; a row needs .* this one has 'question'"),
    ],
)
def test_a_bad_field_is_named_with_its_row(row, field, tmp_path):
    path = written(tmp_path / "r.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(TidarError, match=rf"r.jsonl, line 3: {field}"):
        read_prompts(path)
