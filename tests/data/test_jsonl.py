import pytest

from lilliput.data.jsonl import parse_rows, read_rows, write_rows
from lilliput.errors import DataError


def test_reads_one_row_per_line_and_skips_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2}\r\n', encoding="utf-8", newline="")
    assert read_rows(path) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_unicode_line_separator_inside_a_string_does_not_end_the_row(character):
    assert parse_rows(f'{{"text": "a{character}b"}}\n', "rows.jsonl") == [{"text": f"a{character}b"}]


@pytest.mark.parametrize(("line", "found"), [('{"id": ', "not JSON"), ("[1]", "a list")])
def test_an_error_names_the_source_and_the_line(line, found):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:2: {found}"):
        parse_rows(f'{{"id": 1}}\n{line}\n', "rows.jsonl")


def test_written_rows_are_read_again(tmp_path):
    rows = [{"b": "line\u2028separator\nand feed", "a": 1}, {"text": "Zürich", "nothing": None}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").count("\n") == 2
