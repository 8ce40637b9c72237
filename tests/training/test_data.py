"""Training text on disk: every document in, bad rows named, whole folders only."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import PATIENCE, Process
from tiny import SENTENCES, tiny_llm

from extemb_core.errors import ConfigError, DocumentError, DocumentNotFoundError
from extemb_core.training.data import Samples, TokenFile, read_texts

TEXTS = SENTENCES.splitlines()


def jsonl(texts):
    return "".join(json.dumps({"text": text, "extra": 1}) + "\n" for text in texts).encode()


def write(folder, name, data):
    file = folder / name
    file.write_bytes(zstandard.compress(data) if name.endswith(".zst") else data)
    return file


def documents(tokens):
    return [tokens.tokens[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_rows_are_documents(tmp_path, name):
    assert list(read_texts(write(tmp_path, name, jsonl(TEXTS) + b"\n  \n" + jsonl(["last"])[:-1]))) == [*TEXTS, "last"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.zst"])
def test_another_text_file_is_one_document(tmp_path, name):
    assert list(read_texts(write(tmp_path, name, SENTENCES.encode()))) == [SENTENCES]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.txt", "a.txt.zst"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name):
    data = jsonl(["first", "\ufeffsecond"]) if "jsonl" in name else b"first"
    texts = list(read_texts(write(tmp_path, name, b"\xef\xbb\xbf" + data)))
    assert texts == (["first", "\ufeffsecond"] if "jsonl" in name else ["first"])
    with pytest.raises(DocumentError, match="line 2: not UTF-8"):
        list(read_texts(write(tmp_path, name, b'\xef\xbb\xbf{"text": "a"}\n\xff')))


def test_a_row_larger_than_a_block_and_several_frames(tmp_path):
    texts = ["word " * 100_000, "x", "é" * 70_000]
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(b"".join(zstandard.compress(jsonl([text])) for text in texts))
    assert list(read_texts(file)) == texts
    assert list(read_texts(write(tmp_path, "a.jsonl", jsonl(texts)))) == texts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{not json}", "line 3: not JSON"),
        (b'"just a string"', "line 3: a JSON str, not an object"),
        (b'{"title": "x"}', 'line 3: each row must have a "text"'),
        (b'{"text": null}', 'line 3: "text" is NoneType'),
        (b'{"text": "\xff"}', "line 3: not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_bad_row_is_named(tmp_path, name, row, message):
    file = write(tmp_path, name, jsonl(["one", "two"]) + row + b"\n")
    with pytest.raises(DocumentError, match=message) as caught:
        list(read_texts(file))
    assert str(file) in str(caught.value)


def test_other_bad_files(tmp_path):
    with pytest.raises(DocumentError, match="line 2: not UTF-8"):
        list(read_texts(write(tmp_path, "a.txt", b"good\nbad \xff")))
    with pytest.raises(DocumentNotFoundError, match="does not exist"):
        list(read_texts(tmp_path / "none.txt"))
    with pytest.raises(DocumentNotFoundError):
        TokenFile.build([tmp_path / "none.txt"], tiny_llm(), tmp_path / "cache")


@pytest.mark.parametrize("keep", [-1, -4, 10, 2])
def test_a_zst_file_cut_short_is_not_taken_for_a_whole_one(tmp_path, keep):
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(jsonl(TEXTS * 50))[:keep])
    with pytest.raises(DocumentError, match="ends in the middle"):
        list(read_texts(file))
    file.write_bytes(b"no frame at all")
    with pytest.raises(DocumentError, match=r"not a whole \.zst file"):
        list(read_texts(file))


# -- the token file -----------------------------------------------------------------------------------------------


def test_every_document_once_in_order(tmp_path, caplog):
    llm = tiny_llm()
    files = [write(tmp_path, "a.jsonl", jsonl([*TEXTS[:3], "", TEXTS[0], " \n"])), write(tmp_path, "b.txt", b"Rivers")]
    with caplog.at_level("INFO"):
        built = TokenFile.build(files, llm, tmp_path / "cache")
    assert documents(built) == [llm.encode(text).tolist() for text in [*TEXTS[:3], "Rivers"]]
    assert built.n_tokens == sum(map(len, documents(built)))
    assert "3 empty or repeated documents were left out" in caplog.text
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert json.loads((folder / "meta.json").read_text())["left_out"] == 3


def test_the_second_time_it_is_only_opened(tmp_path, monkeypatch):
    llm, file = tiny_llm(), write(tmp_path, "a.jsonl", jsonl(TEXTS))
    first = documents(TokenFile.build([file], llm, tmp_path))
    monkeypatch.setattr("extemb_core.training.data._tokenise", None)
    assert documents(TokenFile.build([file], llm, tmp_path)) == first
    file.write_bytes(jsonl(TEXTS[1:]))
    with pytest.raises(TypeError):
        TokenFile.build([file], llm, tmp_path)


def test_a_file_under_another_name_is_read_as_that_name_says(tmp_path):
    file = write(tmp_path, "a.txt", jsonl(TEXTS))
    assert len(TokenFile.build([file], tiny_llm(), tmp_path)) == 1
    assert len(TokenFile.build([file.rename(tmp_path / "a.jsonl")], tiny_llm(), tmp_path)) == len(TEXTS)


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_no_more_bytes_than_the_vocabulary_needs(tmp_path, monkeypatch, size, dtype):
    class Big:
        tokenizer = range(size)
        tokenizer_digest = "big"

        @staticmethod
        def encode(text):
            return np.array([0, size - 1], dtype=np.int32)

    built = TokenFile.build([write(tmp_path, "a.txt", b"x")], Big(), tmp_path)
    assert built.tokens.dtype == dtype
    assert built.tokens.tolist() == [0, size - 1]


def test_nothing_but_empty_documents(tmp_path):
    built = TokenFile.build([write(tmp_path, "a.jsonl", jsonl(["", " "]))], tiny_llm(), tmp_path)
    assert (len(built), built.n_tokens) == (0, 0)
    assert len(Samples(built, 8, 4)) == 0


def test_text_that_no_tokenizer_can_read_is_named(tmp_path):
    file = write(tmp_path, "a.jsonl", b'{"text": "fine"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DocumentError, match=r"a\.jsonl, line 2: '\\ud800' is half of a character"):
        TokenFile.build([file], tiny_llm(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_of_tokens_that_cannot_be_made_is_a_setting_and_no_matter_of_weights(tmp_path):
    file, cache = write(tmp_path, "a.txt", b"x"), tmp_path / "file"
    cache.touch()
    with pytest.raises(ConfigError, match=r"file cannot be written to \(.+\); pass another --output, or cache=$"):
        TokenFile.build([file], tiny_llm(), cache)


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
from extemb_core.training.data import TokenFile

class Slow:
    tokenizer, tokenizer_digest = range(300), "slow"
    def encode(self, text):
        print("encode", flush=True)
        time.sleep(float(sys.argv[3]))
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

built = TokenFile.build([Path(sys.argv[1])], Slow(), Path(sys.argv[2]))
print("built", built.tokens.tobytes().hex(), flush=True)
"""


def build_elsewhere(file, cache, seconds):
    return Process(BUILDER, file, cache, str(seconds))


def test_killed_builds_and_two_at_once(tmp_path):
    file, cache = write(tmp_path, "a.jsonl", jsonl(TEXTS[:4])), tmp_path / "cache"
    killed = build_elsewhere(file, cache, PATIENCE)
    assert killed.stdout.readline() == "encode\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]

    two = [build_elsewhere(file, cache, 0.1) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] != ""
    assert sorted(len(lines) for lines in outputs) == [1, 5]  # one tokenised, the other waited
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1  # what was killed is cleared away


@pytest.mark.parametrize("file", ["meta.json", "offsets.npy", "tokens.bin"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", '{"dtype": []}', '{"dtype": "float64"}', "[" * 9999])
def test_a_damaged_folder_of_tokens_is_one_sentence(tmp_path, file, content):
    texts, llm = write(tmp_path, "a.jsonl", jsonl(TEXTS[:4])), tiny_llm()
    TokenFile.build([texts], llm, tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (folder / file).write_text(content)
    for files in ([folder], [texts]):
        with pytest.raises(DocumentError, match=f"{folder.name} is not a folder of tokens .*; pass text files"):
            TokenFile.build(files, llm, tmp_path / "cache")


def test_tokens_that_were_cut_off_are_told(tmp_path):
    texts, llm = write(tmp_path, "a.jsonl", jsonl(TEXTS[:4])), tiny_llm()
    n_tokens = TokenFile.build([texts], llm, tmp_path / "cache").n_tokens
    (tokens,) = (tmp_path / "cache").glob("*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[: n_tokens // 2 * 2])
    with pytest.raises(DocumentError, match=f"{n_tokens // 2:,} tokens where {n_tokens:,} belong"):
        TokenFile.build([texts], llm, tmp_path / "cache")


# -- samples ------------------------------------------------------------------------------------------------------


def token_file(lengths):
    return TokenFile(np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths], dtype=np.int64), {})


@given(lengths=st.lists(st.integers(0, 40), max_size=6), length=st.integers(2, 12), data=st.data())
@settings(deadline=None)
def test_windows_cover_all_that_is_not_counted_as_left_out(lengths, length, data):
    shortest = data.draw(st.integers(1, length))
    file = token_file(lengths)
    samples = Samples(file, length, shortest)
    covered = [int(index) for item in range(len(samples)) for index in samples[item]["input_ids"]]
    assert covered == sorted(set(covered))
    assert len(covered) + samples.left_out == file.n_tokens
    for item in range(len(samples)):
        ids = samples[item]["input_ids"]
        assert shortest <= len(ids) <= length
        owner = np.searchsorted(file.offsets, ids, side="right")
        assert len(set(owner.tolist())) == 1  # one document each
    left = set(range(file.n_tokens)) - set(covered)
    assert all(end - shortest < index for index in left for end in [min(o for o in file.offsets if o > index)])


def test_a_limit_takes_evenly_from_the_whole_file():
    samples = Samples(token_file([10] * 10), 10, 10, limit=4)
    assert [int(samples[item]["input_ids"][0]) for item in range(4)] == [0, 30, 60, 90]
    assert samples[1]["input_ids"].dtype == np.int64
    assert samples.left_out == 0
