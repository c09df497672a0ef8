"""Rows from wherever users keep them: JSONL, JSON, Parquet and text files, folders of those, Hugging Face data sets."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tidar.errors import TidarError, first_line

HUB = "hf:"
END_OF_TEXT = "<|endoftext|>"
"""A line of a text file that holds just this ends a document."""
MISSING_PACKAGES = "needs packages that are not installed: pip install 'tidar[train]'"


class Row(NamedTuple):
    """One row and where it stands: "file, line n"."""

    place: str
    fields: dict[str, Any]


@dataclass
class BadRows:
    """What happens to a row that cannot be used: it is the error, or with `skip` it is counted and remembered."""

    skip: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, error: TidarError) -> None:
        if not self.skip:
            raise error
        self.count += 1
        if len(self.examples) < 3:
            self.examples.append(str(error))

    def report(self) -> str:
        """One line for people, empty if every row was good."""
        return f"{self.count:,} bad rows skipped, the first: " + "; ".join(self.examples) if self.count else ""


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        limit: rows taken of each source; None for all.
        stream: take rows of Hugging Face data sets as they arrive instead of downloading them first.
    """

    limit: int | None = None
    stream: bool = False


def read_rows(source: str | Path, bad: BadRows, how: Reading | None = None) -> Iterator[Row]:
    """Rows of a file, of every file that a folder or a glob pattern names, or of `hf:NAME[:CONFIG][:SPLIT]`.

    Text files give rows with the one field `text`.

    Raises:
        TidarError: for a source that cannot be read, and (unless `bad` skips them) for the first row that cannot.
    """
    how = how or Reading()
    rows = _hub_rows(str(source), how) if str(source).startswith(HUB) else _local_rows(source, bad)
    yield from islice(rows, how.limit)


def local_files(source: str | Path) -> list[Path]:
    """The files that a path, a folder (searched to the bottom) or a glob pattern names, in alphabetical order."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise TidarError(f"{path} holds no data files ({', '.join(READERS)})")
        return files
    if not path.exists() and glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise TidarError(f"no file matches {path}")
        return files
    return [path]


def source_name(source: str | Path) -> str:
    """A source's name for people: without the folder that it is in."""
    return str(source) if str(source).startswith(HUB) else Path(source).name


def _local_rows(source: str | Path, bad: BadRows) -> Iterator[Row]:
    for path in local_files(source):
        try:
            yield from READERS.get(path.suffix.lower(), _jsonl)(path, bad)
        except OSError as error:
            raise TidarError(f"cannot read {path}: {error.strerror or error}") from error


def _jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    with path.open("rb") as lines:  # as bytes: text files would also break lines at U+2028
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    yield _row(place, _parse(line, place))
                except TidarError as error:
                    bad.add(error)


def _json(path: Path, bad: BadRows) -> Iterator[Row]:
    """A JSON array of objects; files that say .json and hold one object a line are common, and read as such."""
    with path.open("rb") as file:
        if file.read(1024).lstrip()[:1] != b"[":
            yield from _jsonl(path, bad)
            return
    for number, value in enumerate(_parse(path.read_bytes(), str(path)), 1):
        try:
            yield _row(f"{path}, row {number}", value)
        except TidarError as error:
            bad.add(error)


def _parse(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TidarError(f"{place}: not UTF-8 text (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise TidarError(f"{place}: not valid JSON ({at})") from error


def _row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise TidarError(f"{place}: a row must be a JSON object, not {type(value).__name__}")
    return Row(place, value)


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Tables have every column in every row: what is null is not there."""
    return {name: value for name, value in fields.items() if value is not None}


def _text(path: Path, bad: BadRows) -> Iterator[Row]:
    """A text file is one document, or several with lines of END_OF_TEXT between them."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        bad.add(TidarError(f"{path} is not UTF-8 text (byte {error.start})"))
        return
    documents = re.split(rf"^{re.escape(END_OF_TEXT)}[ \t]*\n?", text, flags=re.MULTILINE)
    for number, document in enumerate(documents, 1):
        if document.strip():
            yield Row(f"{path}, document {number}" if len(documents) > 1 else str(path), {"text": document})


def _parquet(path: Path, bad: BadRows) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise TidarError(f"{path}: reading Parquet {MISSING_PACKAGES}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", _present(fields))
    except arrow.ArrowException as error:
        where = f"{path}, row {number + 1}" if number else str(path)
        raise TidarError(f"{where}: not readable as Parquet ({first_line(error)})") from error


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet, ".txt": _text}
"""By a file's ending; files with other endings are read as JSONL if they are named one by one."""


class HubSource(NamedTuple):
    """What `hf:NAME`, `hf:NAME:SPLIT` and `hf:NAME:CONFIG:SPLIT` name."""

    name: str
    config: str | None
    split: str


def hub_source(source: str) -> HubSource:
    """Parse a data set's address. Slices as in `hf:NAME:train[:1000]` are part of the split."""
    name, *more = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))
    if not name or len(more) > 2 or not all(more):
        raise TidarError(f"{source} is no data set: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return HubSource(name, more[0] if len(more) == 2 else None, more[-1] if more else "train")


def _hub_rows(source: str, how: Reading) -> Iterator[Row]:
    name, config, split = hub_source(source)
    try:
        import datasets
    except ImportError as error:
        raise TidarError(f"{source}: reading Hugging Face data sets {MISSING_PACKAGES}") from error
    number = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=how.stream)
        for number, fields in enumerate(rows, 1):
            yield Row(f"{source}, row {number}", _present(fields))
    except TidarError:
        raise
    except Exception as error:  # the library, its file formats and the network raise what they like
        where = f"{source}, row {number + 1}" if number else source
        raise TidarError(f"{where}: cannot be read as a data set ({first_line(error)})") from error
