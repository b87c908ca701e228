"""Text corpora: what is trained on, what is held out, and that sample k is a pure function of (seed, stage, k)."""

import gzip
import pickle
import platform
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import compose
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.loader import RankSteps, StreamDataset, train_loader
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import split_of
from bestiary.shared.data.text import StandardLibrary, TextFolder, TextMix
from bestiary.shared.language.byte_tokenizer import ByteTokenizer

EOS = ByteTokenizer().eos_id
STREAM = Stream(0, "pretrain", 4)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Tokens go to the test's own folder; assets are still found where they were fetched."""
    from bestiary.shared.data import token_files

    monkeypatch.setattr(token_files, "data_root", lambda: tmp_path / "data")


@pytest.fixture
def folder(tmp_path):
    """Forty files at two depths, of 5 to 200 characters."""
    root = tmp_path / "corpus"
    rng = np.random.default_rng(0)
    for i in range(40):
        file = root / ("deep" if i % 3 else ".") / f"file{i:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{i:02} " + "".join(rng.choice(list("abcdeé \n"), int(rng.integers(2, 200)))))
    return root


def source(root, **options):
    return TextFolder("byte", root=root, **({"window": 16} | options))


def names_in(root):
    return [p.relative_to(root).as_posix() for p in root.rglob("*.txt")]


# ------------------------------------------------------------------ documents and splits


def test_it_is_a_source(folder):
    data = source(folder)
    assert isinstance(data, DataSource)
    data.check()
    assert data.spec().task == "text"


def test_the_split_is_by_the_hash_of_the_name(folder):
    data = source(folder, held_out_documents=None)
    for split in ("train", "val", "test"):
        expected = {name for name in names_in(folder) if split_of(name) == split}
        assert {d.name for d in data.documents(split)} == expected
        assert expected
        assert {e["id"] for e in data.held_out(split)} == {f"text_folder/{name}" for name in expected}
    example = data.held_out("val")[0]
    assert example["text"] == (folder / example["id"].removeprefix("text_folder/")).read_text()
    with pytest.raises(ConfigError, match="no split 'dev'"):
        data.held_out("dev")
    with pytest.raises(ConfigError, match="has no parts"):
        data.held_out("val", "chat")


def test_held_out_documents_are_capped_in_a_fixed_order(folder):
    everything = list(source(folder, held_out_documents=None).held_out("val"))
    assert len(everything) > 2
    assert list(source(folder, held_out_documents=2).held_out("val")) == everything[:2]
    short = source(folder, held_out_documents=2, held_out_chars=7).held_out("val")
    assert [e["text"] for e in short] == [e["text"][:7] for e in everything[:2]]
    # Files that are added put none of the others elsewhere.
    (folder / "another.txt").write_text("another")
    assert [
        e for e in source(folder, held_out_documents=None).held_out("val") if "another" not in e["id"]
    ] == everything


def test_the_revision_names_the_texts(folder):
    first = source(folder).revision
    assert first.startswith("text_folder-")
    assert source(folder, window=99, held_out_documents=1, reset=False).revision == first
    assert source(folder, files=["*1.txt"]).revision != first
    assert source(folder, split_on="a").revision != first
    path = folder / "file00.txt"
    text = path.read_text()
    path.write_text(text + "x")
    assert source(folder).revision != first
    path.write_text(text)
    assert source(folder).revision == first
    path.rename(folder / "file99.txt")
    assert source(folder).revision != first


def test_equal_texts_count_once(folder):
    """Else a text could be trained on under one name and held out under another."""
    before = {s: len(source(folder).documents(s)) for s in ("train", "val", "test")}
    for i in range(20):
        (folder / f"z{i}.txt").write_text((folder / "file00.txt").read_text())
    assert {s: len(source(folder).documents(s)) for s in ("train", "val", "test")} == before


def test_which_files_are_read(folder):
    count = len(names_in(folder))
    (folder / ".hidden").mkdir()
    for name in (".hidden/a.txt", ".b.txt", "c.rar", "deep/d.TXT"):
        (folder / name).write_text(name)
    (folder / "empty.txt").write_text(" \n")
    with gzip.open(folder / "packed.md.gz", "wt") as file:
        file.write("packed text")
    data = source(folder)
    assert sum(len(data.documents(s)) for s in ("train", "val", "test")) == count
    data = source(folder, files=["*.txt", "*.gz"], exclude=[".*", "deep"])
    found = {d.name: d for s in ("train", "val", "test") for d in data.documents(s)}
    assert set(found) == {n for n in names_in(folder) if n[0] == "f"} | {"packed.md.gz"}
    assert data.text(found["packed.md.gz"]) == "packed text"


def test_a_file_is_cut_into_documents(tmp_path):
    text = "intro\n" + "".join(f":word{i}: about {i}\n  more\n" for i in range(60)) + ":word3: twice\n"
    (tmp_path / "one.txt").write_text(text)
    data = source(tmp_path, split_on="^(?=:)", held_out_documents=None)
    data.check()
    documents = [d for s in ("train", "val", "test") for d in data.documents(s)]
    assert len(documents) == 62
    assert "one.txt#:word7: about 7" in {d.name for d in documents}
    texts = {data.text(d) for d in documents}
    assert texts >= {"intro\n", ":word7: about 7\n  more\n", ":word3: twice\n"}
    assert sum(map(len, texts)) == len(text)
    with pytest.raises(ConfigError, match="split_on is no regular expression"):
        source(tmp_path, split_on="(")
    with pytest.raises(ConfigError, match="may not capture a group"):
        source(tmp_path, split_on="(a)")


# ------------------------------------------------------------------ bad input


def test_a_few_bad_files_are_named_in_one_line(folder, capsys):
    (folder / "picture.txt").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    data = source(folder)
    data.check()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("text_folder: left out: 2 files cannot be read as UTF-8 text: latin.txt ('utf-8' codec")
    assert "picture.txt (binary: it has a NUL byte)" in line


def test_many_bad_files_are_an_error(folder):
    for i in range(10):
        (folder / f"bad{i}.txt").write_bytes(b"\0")
    with pytest.raises(BadDataError, match=r"10 files cannot be read .*; and 5 more\. Is this the folder"):
        source(folder).check()


def test_missing_things(tmp_path, folder):
    with pytest.raises(MissingDataError, match=r"no such folder\. Set dataset\.root"):
        source(tmp_path / "none").check()
    with pytest.raises(ConfigError, match=r"give dataset\.root"):
        source(None).check()
    with pytest.raises(BadDataError, match=r"too few documents \(0 train, 0 val, 0 test\).*split_on"):
        source(folder, files=["*.rst"]).check()
    with pytest.raises(ConfigError, match="names no tokenizer: choose a language model"):
        TextFolder(None, root=folder).check()
    with pytest.raises(ConfigError, match="longer than all training documents"):
        source(folder, window=10**6).train_example(0, STREAM)


# ------------------------------------------------------------------ training samples


def test_a_sample_by_hand(tmp_path):
    """One training document, so one order: the stream is eos and its bytes."""
    (tmp_path / "a.txt").write_text("abcdefg")
    assert split_of("a.txt") == "train"
    data = source(tmp_path, window=4)
    rows = {}
    for k in range(2):
        example = check_example(data.train_example(k, STREAM))
        rows[example["id"]] = example["tokens"].tolist()
        assert example["documents"].tolist() == [0] * 4
        assert example["meta"] == {"tokenizer": "byte"}
    assert rows == {"text_folder/0/0": [EOS, *b"abc"], "text_folder/0/1": [*b"defg"]}


def test_a_round_is_all_training_documents_joined(folder):
    data = source(folder, held_out_documents=None)
    n = data.packing.windows
    train = {data.text(d) for d in data.documents("train")}
    streams = []
    for count in range(3):
        rows = {}
        for k in range(count * n, (count + 1) * n):
            example = data.train_example(k, STREAM)
            rows[int(example["id"].rsplit("/", 1)[1])] = example["tokens"]
        assert sorted(rows) == list(range(n))  # each window once
        stream = np.concatenate([rows[i] for i in range(n)]).tolist()
        whole = "".join("\0" if t == EOS else chr(t) for t in stream)
        texts = [t.encode("latin-1").decode(errors="ignore") for t in whole.split("\0")]
        assert texts[0] == ""
        *complete, last = texts[1:]
        assert len(set(complete)) == len(complete)
        assert set(complete) <= train
        assert any(t.startswith(last) for t in train)
        assert sum(len(t.encode()) + 1 for t in train) - n * 16 < 16
        streams.append(stream)
    assert streams[0] != streams[1] != streams[2]


def test_held_out_text_is_never_trained_on(tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"<{i:02}>" * 20)
    data = source(tmp_path, held_out_documents=None)
    held = {e["text"][:4] for s in ("val", "test") for e in data.held_out(s)}
    train = {data.text(d)[:4] for d in data.documents("train")}
    assert len(held) > 2
    tokens = [data.train_example(k, STREAM)["tokens"].tolist() for k in range(data.packing.windows)]
    trained = "|".join(ByteTokenizer().decode(row) for row in tokens)  # a mark must not come about by joining
    assert not any(mark in trained for mark in held)
    assert all(mark in trained for mark in train)


def same(one, other):
    return all(
        a["id"] == b["id"] and (a["tokens"] == b["tokens"]).all() and (a["documents"] == b["documents"]).all()
        for a, b in zip(one, other, strict=True)
    )


def test_samples_are_pure(folder):
    ks = range(300)  # several rounds
    data = source(folder)
    assert data.packing.windows < 250
    forth = [data.train_example(k, STREAM) for k in ks]
    other = source(folder)
    back = [other.train_example(k, STREAM) for k in reversed(ks)][::-1]
    assert same(forth, back)
    assert same([other.train_example(k, Stream(0, "pretrain", 64)) for k in ks], forth)  # the batch does not matter
    for stream in (Stream(1, "pretrain", 4), Stream(0, "later", 4)):
        assert not same([data.train_example(k, stream) for k in ks], forth)
    assert same([pickle.loads(pickle.dumps(data)).train_example(k, STREAM) for k in ks[:5]], forth[:5])


class Collect:
    def __call__(self, examples, mode):
        return [(e["id"], e["tokens"].tolist(), e["documents"].tolist()) for e in examples]


def test_workers_and_a_later_start_change_nothing(folder):
    def load(start, workers):
        return list(
            train_loader(StreamDataset(source(folder), STREAM), RankSteps(9, 4, start=start), Collect(), workers)
        )

    whole = load(0, 0)
    assert load(0, 2) == whole
    assert load(5, 2) == load(5, 0) == whole[5:]


def test_plain_concatenation(folder):
    plain, packed = source(folder, reset=False), source(folder)
    for k in range(20):
        one, other = plain.train_example(k, STREAM), packed.train_example(k, STREAM)
        assert "documents" not in one
        assert (one["tokens"] == other["tokens"]).all()


def test_tokens_are_made_once(folder, monkeypatch):
    source(folder).train_example(0, STREAM)
    asked = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: asked.append(text) or encode(self, text))
    source(folder, window=8).train_example(0, STREAM)
    assert asked == []
    (folder / "file00.txt").write_text("another text")
    source(folder).train_example(0, STREAM)
    assert "another text" in asked


# ------------------------------------------------------------------ the corpora


def test_a_mix_draws_by_size_and_by_part(tmp_path):
    corpora = {}
    for name, files in (("a", 10), ("b", 30)):
        (tmp_path / name).mkdir()
        for i in range(files):
            (tmp_path / name / f"{i}.txt").write_text(name * 10 + f" {i}" * 30)
        corpora[name] = source(tmp_path / name, name=name)
    mix = TextMix(corpora)
    assert isinstance(mix, DataSource)
    mix.check()
    assert mix.revision == f"{corpora['a'].revision}+{corpora['b'].revision}"
    sizes = {name: corpus.packing.windows for name, corpus in corpora.items()}
    ids = [mix.train_example(k, STREAM)["id"][0] for k in range(2000)]
    share = sizes["a"] / sum(sizes.values())
    assert abs(ids.count("a") / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert {mix.train_example(k, STREAM, "b")["id"][0] for k in range(50)} == {"b"}
    assert list(mix.held_out("val", "b")) == list(corpora["b"].held_out("val"))
    assert list(mix.held_out("val")) == [*corpora["a"].held_out("val"), *corpora["b"].held_out("val")]
    with pytest.raises(ConfigError, match="the parts a, b, not 'c'"):
        mix.held_out("val", "c")
    with pytest.raises(ConfigError, match="at least one corpus"):
        TextMix({})


def dataset(name, *overrides):
    return build(compose(["+project=_examples", f"dataset={name}", *overrides])[0].dataset)


def test_the_standard_library():
    data = dataset("stdlib_code")
    assert isinstance(data, StandardLibrary)
    data.check()
    assert data.revision.startswith(f"stdlib_code-{platform.python_version()}-")
    names = {d.name for s in ("train", "val", "test") for d in data.documents(s)}
    assert len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not {"test", "tests", "site-packages", "encodings"} & {part for n in names for part in n.split("/")}
    (argparse,) = [d for s in ("train", "val", "test") for d in data.documents(s) if d.name == "argparse.py"]
    assert data.text(argparse).encode() == (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()


def test_the_manual(need_asset):
    need_asset("python311_doc")
    data = dataset("python_docs")
    data.check()
    documents = [d for s in ("train", "val", "test") for d in data.documents(s)]
    assert len(documents) == 497
    assert sum(len(data.text(d).encode()) for d in documents) > 10_000_000
    assert data.skipped == {}


def test_the_jargon_file(need_asset):
    root = need_asset("jargon")
    data = dataset("jargon")
    data.check()
    documents = [d for s in ("train", "val", "test") for d in data.documents(s)]
    text = gzip.decompress((root / "jargon.txt.gz").read_bytes()).decode()
    headwords = [line for line in text.splitlines() if line.startswith("   :") and ":" in line[5:] and line[4] != " "]
    entries = [d for d in documents if "#:" in d.name]
    assert abs(len(entries) - len(headwords)) < 5  # a headword may be broken over two lines
    (foo,) = [data.text(d) for d in documents if d.name.startswith("jargon.txt.gz#:foobar:")]
    assert foo.startswith("   :foobar: n.\n\n   [very common] Another widely used {metasyntactic variable}")
    assert ":foolproof" not in foo


def test_without_a_tokenizer_the_answer_is_short():
    for overrides in (["+project=_examples", "backbone=none"], ["+project=asm_unet"]):
        cfg, _ = compose([*overrides, "dataset=stdlib_code"])
        with pytest.raises(ConfigError, match="stdlib_code is read in the tokens of the backbone"):
            build(cfg.dataset).check()


def test_a_backbone_that_names_none_has_its_checkpoints():
    cfg, _ = compose(["+project=nemotron_h", "backbone=nemotron_h_8b", "backbone.path=/some/folder"])
    assert build(cfg.dataset).tokenizer == "/some/folder"
    cfg, _ = compose(["+project=nemotron_h", "backbone=nemotron_h_8b", "backbone.path=/x", "backbone.tokenizer=byte"])
    assert build(cfg.dataset).tokenizer == "byte"


def test_a_window_is_the_recipes():
    assert compose(["+project=_examples", "dataset=jargon"])[0].dataset.window == 1024
    assert compose(["+project=nemotron_h", "dataset=jargon", "recipe.window=77"])[0].dataset.window == 77
