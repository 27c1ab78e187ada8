"""Files are written whole or not at all."""

import errno
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from safetensors.torch import save_file

import mistral
from mistral.chat import Conversation
from mistral.checkpoints.hugging_face import save
from mistral.files import format_bytes, whole_file


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_stays_as_it_was_when_writing_fails(tmp_path, error):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as file:
        file.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    path = tmp_path / "m.gguf"
    message = f"^cannot write {path}: no space left on the disk .2.00 MB needed, 1.50 MB free.$"
    with pytest.raises(OSError, match=message), whole_file(path, size=2_000_000):
        pytest.fail("the block must not run")
    with whole_file(path, size=1_500_000) as file:
        file.write_bytes(b"fits")
    assert path.read_bytes() == b"fits"


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), 9e9, "no space left on the disk "),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 9e9, "its quota is used up"),
    (OSError(errno.EFBIG, "File too large"), 9e9, "the file is too large"),
    (OSError("100000 requested and 0 written"), 0, "no space left on the disk "),
    (OSError("100000 requested and 512 written"), 9e9, "the file is too large"),
    (ValueError("I/O error: No space left on device (os error 28)"), 0, "no space left on the "),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 0, "no space"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "free", "words"), ERRORS, ids=lambda value: str(value)[:40])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch, error, free, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    path = tmp_path / "notes.txt"
    match = f"^cannot write {path}: .*{words}"
    with pytest.raises(OSError, match=match) as raised, whole_file(path) as file:
        file.write_text("ne")
        raise error
    assert raised.value.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert "Errno" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied"), ValueError("os error 2"), OSError("odd")]
)
def test_other_errors_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, whole_file(tmp_path / "notes.txt"):
        raise error
    assert raised.value is error


@pytest.fixture
def no_file_above_4_kb():
    """What a full disk looks like to a process: no file can grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


VALUES = torch.zeros(10_000)
WRITERS = {
    "text": lambda file: file.write_text("x" * 10_000),
    "numpy": lambda file: VALUES.numpy().tofile(file),
    "safetensors": lambda file: save_file({"a": VALUES}, file),
    "torch.save": lambda file: torch.save(VALUES, file),
    "npz": lambda file: np.savez(file.open("wb"), VALUES.numpy()),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_writer_that_hits_the_end_is_one_line(write, tmp_path, no_file_above_4_kb):
    path = tmp_path / "big.bin"
    with pytest.raises(OSError, match=f"^cannot write {path}: "), whole_file(path) as file:
        write(file)
    assert not list(tmp_path.iterdir())


def test_saving_on_a_full_disk_leaves_nothing_behind(tmp_path, no_file_above_4_kb):
    folder = tmp_path / "model"
    with pytest.raises(OSError, match="model.safetensors: the file is too large"):
        save(small.model(), None, folder)
    assert not list(folder.iterdir())
    model, tokenizer = mistral.load("demo", device="cpu")
    conversation = Conversation(model, tokenizer, system="x" * 5000)
    with pytest.raises(OSError, match="talk.jsonl: the file is too large"):
        conversation.save(tmp_path / "talk.jsonl")
    assert list(tmp_path.iterdir()) == [folder]


def test_the_export_script_on_a_full_disk_ends_with_one_line(tmp_path):
    script = [sys.executable, "scripts/export_gguf.py", str(small.DATA / "small")]
    out = tmp_path / "out.gguf"
    command = ["bash", "-c", 'ulimit -f 1000; exec "$0" "$@"', *script, str(out), "--type", "F32"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=small.ROOT)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: cannot write {out}: the file is too large")
    assert len(run.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_sizes_are_in_decimal_units():
    assert format_bytes(4_367_704_064) == "4.37 GB"
    assert [format_bytes(n) for n in (0, 999, 1000, 2e12)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "2000.00 GB",
    ]
