"""The faster reading of arrays gives the same fields as gguf's own reader."""

import gguf
import numpy as np
import pytest

from lilliput.gguf_source.header import parsed_once, read_header

ARRAYS = {
    "tokenizer.texts": ["", "a", "ß 東京", "x" * 300],
    "tokenizer.floats": [0.5, -1.25, 3.0],
    "tokenizer.integers": [1, -2, 2**31 - 1],
    "tokenizer.flags": [True, False],
    "tokenizer.single": ["one"],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    writer.add_key_value("tokenizer.nested", [[1, 2], [3, 4]], gguf.GGUFValueType.ARRAY)
    writer.add_tensor("weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_field_and_tensor_is_as_gguf_reads_it(file):
    expected = gguf.GGUFReader(file)
    with parsed_once():
        actual = gguf.GGUFReader(file)
    assert actual.fields.keys() == expected.fields.keys()
    for name, field in expected.fields.items():
        other = actual.fields[name]
        assert (other.offset, other.data, other.types) == (field.offset, field.data, field.types)
        for one, two in zip(other.parts, field.parts, strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        assert other.contents() == field.contents()
    np.testing.assert_array_equal(actual.tensors[0].data, expected.tensors[0].data)


def test_a_text_that_ends_after_the_file_is_an_error(file):
    content = file.read_bytes()
    place = content.index(b"x" * 300) - 8
    file.write_bytes(content[:place] + (2**40).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(ValueError, match="ends after the file"), parsed_once():
        read_header(file)
