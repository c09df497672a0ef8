"""Local files as the documents of harness tasks: found by name, checked row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tidar.errors import TidarError
from tidar.prompts import field_names
from tidar.sources import READERS, BadRows, Row, local_files, read_rows

Document = dict[str, Any]
SPLITS = ("", "_test", "_validation", "_val")
"""What may follow a set's name in that of its file, the first that is there counts."""
EXAMPLE_SPLITS = ("_train", "_dev")


class Form(NamedTuple):
    """One way in which a task's rows may be written.

    Attributes:
        fields: the fields that a row needs.
        document: from a row to the task's document; raises TidarError for fields that cannot be meant.
        processed: whether the documents are as the task's own `process_docs` would leave them.
    """

    fields: tuple[str, ...]
    document: Callable[[Document], Document] = dict
    processed: bool = False


class LocalSet(NamedTuple):
    """Names that a task's file may have (without split and ending), the forms its rows may have, and, for a file with
    all splits, which rows are the test's."""

    names: tuple[str, ...]
    forms: tuple[Form, ...]
    tested: Callable[[Document], bool] | None = None


class Documents(NamedTuple):
    """What was read: documents to score, examples to show before them, and where both come from (file names).

    processed: as in `Form`.
    """

    scored: list[Document]
    examples: list[Document]
    source: str
    processed: bool


def read(task: str, local: LocalSet, folder: Path, shots: int = 0, by: str | None = None) -> Documents:
    """Documents of a task from a folder, searched to the bottom.

    Args:
        task: its name, for messages.
        shots: examples wanted. They come from a file of a training split; without one they are the first rows of the
            file (of each value of field `by`), which are then not scored.
        by: a field of documents that must be equal in a document and its examples.

    Raises:
        TidarError: for a folder or file that is not there, and naming the first row that cannot be used.
    """
    files = _files(folder)
    path = _find(files, local.names, SPLITS)
    if path is None:
        wanted = ", ".join(f"{name}{split}.jsonl" for name in local.names for split in SPLITS)
        raise TidarError(f"{folder} has no file for task {task}: it takes one of {wanted}")
    scored, processed = _documents(path, local.forms)
    if local.tested is not None:
        scored = [document for document in scored if local.tested(document)]
        if not scored:
            raise TidarError(f"{path} holds no row of the test split of task {task}")
    if not shots:
        return Documents(scored, [], path.name, processed)
    other = _find(files, local.names, EXAMPLE_SPLITS)
    if other is not None:
        examples, alike = _documents(other, local.forms)
        if alike != processed:
            raise TidarError(f"{other} and {path} have rows of different forms: task {task} needs one for both")
        return Documents(scored, examples, f"{path.name}, examples from {other.name}", processed)
    groups: dict[object, list[Document]] = {}
    for document in scored:
        groups.setdefault(document[by] if by else None, []).append(document)
    short = next((group for group in groups.values() if len(group) <= shots), None)
    if short is not None:
        where = f" with {by} {short[0][by]!r}" if by else ""
        raise TidarError(
            f"{path} has {len(short)} rows{where}, but task {task} shows {shots} as examples before one: put examples "
            f"into {local.names[0]}{EXAMPLE_SPLITS[0]}.jsonl beside it"
        )
    examples = [document for group in groups.values() for document in group[:shots]]
    rest = [document for group in groups.values() for document in group[shots:]]
    held = f"the first {shots} rows{f' of each {by}' if by else ''} are examples and not scored"
    return Documents(rest, examples, f"{path.name}, {held}", processed)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TidarError(f"--data-dir {folder} is no folder")
    return local_files(folder)


def _find(files: Iterable[Path], names: Sequence[str], splits: Sequence[str]) -> Path | None:
    stems: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in READERS:
            stems.setdefault(path.stem, []).append(path)
    found = next((stems[name + split] for split in splits for name in names if name + split in stems), None)
    if found is not None and len(found) > 1:
        raise TidarError(f"{found[0]} and {found[1]} have the same name: leave one of them in --data-dir")
    return found[0] if found is not None else None


def _documents(path: Path, forms: Sequence[Form]) -> tuple[list[Document], bool]:
    rows = read_rows(path, BadRows())
    first = list(islice(rows, 1))
    if not first:
        raise TidarError(f"{path} holds no rows")
    form = next((form for form in forms if all(name in first[0].fields for name in form.fields)), forms[0])
    return [_document(row, form) for row in (*first, *rows)], form.processed


def _document(row: Row, form: Form) -> Document:
    for name in form.fields:
        if name not in row.fields:
            raise TidarError(f"{row.place}: no field '{name}', but {field_names(row.fields)}")
    try:
        return form.document(row.fields)
    except TidarError as error:
        raise TidarError(f"{row.place}: {error}") from error


def choice_form(document: Callable[[str, list[str], int], Document], count: int | None = None, *more: str) -> Form:
    """Rows with `context`, `choices` and `gold` (the index of the right one), and fields `more` that stay.

    Args:
        document: from context, choices and gold to a document.
        count: how many choices the task has; None for any number from two on.
    """

    def convert(row: Document) -> Document:
        context, choices, gold = row["context"], row["choices"], row["gold"]
        if not isinstance(context, str):
            raise TidarError(f"field 'context' must be a text, not {type(context).__name__}")
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
            raise TidarError("field 'choices' must be a list of texts")
        if len(choices) < 2 or count not in (None, len(choices)):
            raise TidarError(f"field 'choices' has {len(choices)} entries, but must have {count or 'at least 2'}")
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise TidarError(f"field 'gold' is {gold!r}, but must be the index of a choice: 0 to {len(choices) - 1}")
        return document(context, choices, gold) | {name: row[name] for name in more}

    return Form(("context", "choices", "gold", *more), convert, True)


def text_form(*fields: str, lists: tuple[str, ...] = ()) -> Form:
    """Rows whose fields are as on the hub: texts, and lists of texts."""

    def checked(row: Document) -> Document:
        for name in fields:
            if not isinstance(row[name], str):
                raise TidarError(f"field '{name}' must be a text, not {type(row[name]).__name__}")
        for name in lists:
            if not isinstance(row[name], list) or not row[name] or not all(isinstance(v, str) for v in row[name]):
                raise TidarError(f"field '{name}' must be a list of texts")
        return dict(row)

    return Form((*fields, *lists), checked)
