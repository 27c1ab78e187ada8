"""Files are written whole or not at all."""

import errno
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from safetensors.torch import save_file

import mistral
from mistral import temporary
from mistral.chat import Conversation
from mistral.checkpoints.hugging_face import save
from mistral.files import (
    append_line,
    expanded,
    format_bytes,
    read_text,
    whole_file,
    whole_folder,
    write_text,
)
from mistral.temporary import new_file, new_folder


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
    with pytest.raises(OSError, match=f"cannot write {folder}: the file is too large"):
        save(small.model(), None, folder)
    assert not folder.exists()
    model, tokenizer = mistral.load("demo", device="cpu")
    conversation = Conversation(model, tokenizer, system="x" * 5000)
    with pytest.raises(OSError, match="talk.jsonl: the file is too large"):
        conversation.save(tmp_path / "talk.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_export_script_on_a_full_disk_ends_with_one_line(tmp_path):
    script = [sys.executable, "scripts/export_gguf.py", str(small.DATA / "small")]
    out = tmp_path / "out.gguf"
    command = ["bash", "-c", 'ulimit -f 1000; exec "$0" "$@"', *script, str(out), "--type", "F32"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=small.ROOT)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: cannot write {out}: the file is too large")
    assert len(run.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_two_that_write_one_file_both_succeed_and_leave_one_of_them(tmp_path):
    path = tmp_path / "out.gguf"
    with whole_file(path) as slow:
        slow.write_bytes(b"slow")
        with whole_file(path) as quick:
            quick.write_bytes(b"quick")
        assert path.read_bytes() == b"quick"
        assert slow.read_bytes() == b"slow"
    assert path.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [path]


def in_a_child(work):
    """Fork a process that does nothing but `work`; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def rewritten_forever(path, letter):
    def work():
        while True:
            with whole_file(path) as file, file.open("w") as out:
                for _ in range(50):
                    out.write(letter * 1000)

    return work


def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "out.bin"
    whole = {"a" * 50_000, "b" * 50_000}
    path.write_text("a" * 50_000)
    moments = random.Random(0)
    for _ in range(12):
        children = [in_a_child(rewritten_forever(path, letter)) for letter in "ab"]
        time.sleep(moments.uniform(0, 0.02))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert path.read_text() in whole
        for leftover in set(tmp_path.iterdir()) - {path}:
            assert leftover.name.startswith("out.bin.")
            assert leftover.name.endswith(".unfinished")
    write_text(path, "the next one")
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_a_dead_process_left_is_deleted(tmp_path):
    path = tmp_path / "out.bin"
    dead = tmp_path / f"out.bin.{'0' * 16}.unfinished"
    dead.write_text("of a process that was killed")
    dead_folder = tmp_path / f"out.bin.{'1' * 16}.unfinished"
    dead_folder.mkdir()
    (dead_folder / "config.json").write_text("{}")
    others = [tmp_path / name for name in ("out.bin.unfinished", f"in.bin.{'0' * 16}.unfinished")]
    for other in others:
        other.write_text("not ours")
    living, lock = new_file(path, 0o666)
    living_folder, folder_lock = new_folder(path)
    write_text(path, "new")
    assert set(tmp_path.iterdir()) == {path, living, living_folder, *others}
    os.close(lock)
    os.close(folder_lock)
    write_text(path, "new")
    assert set(tmp_path.iterdir()) == {path, *others}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists open files as Linux does")
def test_files_and_folders_are_written_as_windows_needs_it(tmp_path, monkeypatch):
    """No locks, no descriptor of a folder, and nothing that is open can be renamed or replaced."""

    def open_no_folder(path, *arguments, opened=os.open, **options):
        if Path(path).is_dir() and "dir_fd" not in options:  # shutil passes one
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    def moved(name):
        move = getattr(Path, name)

        def check(path, target):
            links = list(Path("/proc/self/fd").iterdir())
            assert path not in [link.readlink() for link in links if link.is_symlink()]
            return move(path, target)

        return check

    monkeypatch.setattr(temporary, "fcntl", None)
    monkeypatch.setattr(os, "open", open_no_folder)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, moved(name))
    for text in ("first", "second"):
        write_text(tmp_path / "out.txt", text)
        with whole_folder(tmp_path / "folder", "config.json") as unfinished:
            for name in ("weights", "config.json"):
                (unfinished / name).write_text(text)
        files = [tmp_path / "out.txt", *(tmp_path / "folder").iterdir()]
        assert [file.read_text() for file in files] == [text] * 3
    assert {file.name for file in tmp_path.iterdir()} == {"out.txt", "folder"}


@pytest.mark.skipif(os.name == "nt", reason="uses links and permissions")
def test_links_and_permissions_stay_as_they_were(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there/real.txt"
    link = tmp_path / "link.txt"
    link.symlink_to("there/real.txt")
    write_text(link, "created through the link")
    target.chmod(0o640)
    write_text(link, "replaced")
    assert link.is_symlink()
    assert target.read_text() == "replaced"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [file.name for file in target.parent.iterdir()] == ["real.txt"]
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new.txt", "")
        with whole_folder(tmp_path / "model", last="a.txt") as folder:
            (folder / "a.txt").touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "model/a.txt").stat().st_mode) == 0o640


LONG = "ü" * 127  # 254 of the 255 bytes that a name may have


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    write_text(tmp_path / LONG, "new")
    assert [file.name for file in tmp_path.iterdir()] == [LONG]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "it is a folder; name a file"),
        ("missing/out.txt", "its folder does not exist"),
        ("file/out.txt", "a part of its path is a file"),
        (LONG + "üü", "its name is too long"),
        ("loop", "it is a link that leads to itself"),
        ("missing/\x1b]0;title\n", "its folder does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_one_line_that_says_why(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="^cannot write ") as raised:
        write_text(tmp_path / name, "new")
    message = str(raised.value)
    assert message.endswith(f": {words}") or words in message
    assert message.isprintable()
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, PermissionError, "permission denied"),
        (errno.EROFS, OSError, "the file system is read-only"),
        (errno.EDQUOT, OSError, "quota"),
    ],
)
def test_a_folder_that_takes_no_file_is_one_line(tmp_path, monkeypatch, number, kind, words):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def refuse(file, *_):
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=f"^cannot write {path}: .*{words}"):
        write_text(path, "new")
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # read-only, to anyone but root
    with pytest.raises(PermissionError, match=f"^cannot write {path}: permission denied"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_when_the_file_is_synchronized_keeps_the_earlier_one(
    tmp_path, monkeypatch
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "out.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"^cannot write {path}: no space left on the disk"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_pipes_and_devices_get_the_finished_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard = []
    listener = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    listener.start()
    write_text(pipe, "through the pipe")
    listener.join(timeout=60)
    assert heard == ["through the pipe"]
    assert list(tmp_path.iterdir()) == [pipe]
    with pytest.raises(OSError, match="^cannot write /dev/full: no space left"):
        write_text(Path("/dev/full"), "x")
    log = tmp_path / "log"
    log.write_text("earlier ")
    with log.open("a") as opened:
        write_text(Path(f"/dev/fd/{opened.fileno()}"), "and later")
    assert log.read_text() == "earlier and later"


def fill(folder, letter):
    for name in ("config.json", "weights"):
        (folder / name).write_text(letter)


def test_a_folder_of_files_is_there_with_all_of_them_or_not_at_all(tmp_path):
    folder = tmp_path / "models/new"
    with pytest.raises(KeyError), whole_folder(folder, last="config.json") as unfinished:
        fill(unfinished, "a")
        raise KeyError
    assert not list(folder.parent.iterdir())
    with whole_folder(folder, last="config.json") as unfinished:
        with whole_folder(folder, last="config.json") as quick:
            fill(quick, "a")
        (folder / "notes.txt").write_text("mine")
        fill(unfinished, "b")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "config.json": "b",
        "weights": "b",
        "notes.txt": "mine",
    }
    (folder / "weights").unlink()
    (folder / "weights").mkdir()  # found before any file is replaced
    with pytest.raises(IsADirectoryError), whole_folder(folder, last="config.json") as unfinished:
        fill(unfinished, "c")
    assert (folder / "config.json").read_text() == "b"
    assert list(folder.parent.iterdir()) == [folder]
    assert len(list(folder.iterdir())) == 3


def saved_forever(folder, letter):
    def work():
        while True:
            with whole_folder(folder, last="config.json") as unfinished:
                fill(unfinished, letter)

    return work


@pytest.mark.parametrize("inner", [False, True])
def test_a_process_that_is_killed_at_any_moment_leaves_a_whole_folder(tmp_path, inner):
    folder = tmp_path / "model"
    folder.mkdir(mode=0o750)
    fill(folder, "a")
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    if inner:  # then files are replaced one by one
        (folder / "inner").mkdir()
    moments = random.Random(0)
    for _ in range(10):
        children = [in_a_child(saved_forever(folder, letter)) for letter in "ab"]
        time.sleep(moments.uniform(0, 0.02))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        read = {name: folder / name for name in ("config.json", "weights")}
        letters = {name: path.read_text() for name, path in read.items() if path.exists()}
        assert (inner and "config.json" not in letters) or letters in (
            {"config.json": "a", "weights": "a"},
            {"config.json": "b", "weights": "b"},
        )
    with whole_folder(folder, last="config.json") as unfinished:
        fill(unfinished, "c")
    assert (folder / "link").read_text() == "mine"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    left = {"config.json", "weights", "notes.txt", "link"} | ({"inner"} if inner else set())
    assert {path.name for path in folder.iterdir()} == left
    assert list(tmp_path.iterdir()) == [folder]


def test_what_others_write_while_a_folder_takes_the_place_of_another_stays(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    fill(folder, "a")
    for name in ("replaced", "kept", "deleted"):
        (folder / name).write_text("earlier")
    exchange = mistral.exchange._exchange

    def late(new, target):
        write_text(target / "replaced", "now")
        write_text(target / "added", "now")
        exchange(new, target)
        (target / "deleted").unlink()

    monkeypatch.setattr(mistral.exchange, "_exchange", late)
    with whole_folder(folder, last="config.json") as unfinished:
        fill(unfinished, "b")
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts == dict(replaced="now", added="now", kept="earlier", weights="b") | {
        "config.json": "b"
    }


def test_a_folder_that_this_process_works_in_stays_the_same(tmp_path, monkeypatch):
    fill(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    with whole_folder(Path(), last="config.json") as unfinished:
        fill(unfinished, "b")
    assert {path.name: path.read_text() for path in Path().iterdir()} == {
        "config.json": "b",
        "weights": "b",
    }


def test_a_file_that_cannot_be_replaced_leaves_the_earlier_folder(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    fill(tmp_path, "a")

    def refuse(file, target):
        raise PermissionError(errno.EACCES, "", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError), whole_folder(tmp_path, last="config.json") as unfinished:
        fill(unfinished, "b")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "weights").read_text() == "a"


@pytest.mark.parametrize("place", ["", "model"])
def test_a_folder_that_a_killed_process_left_says_so(tmp_path, place):
    folder = tmp_path / "model"
    shutil.copytree(small.DATA / "small", folder)
    (folder / "config.json").unlink()
    (tmp_path / place / f"model.{'0' * 16}.unfinished").mkdir()
    with pytest.raises(mistral.CheckpointError, match="the process that was saving it .* again"):
        mistral.load(folder)


def test_the_file_that_completes_a_folder_is_replaced_last(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()  # then they are replaced one by one
    replaced = []
    monkeypatch.setattr(Path, "replace", lambda file, target: replaced.append(target.name))
    for last in ("config.json", "weights"):
        replaced.clear()
        with whole_folder(tmp_path, last=last) as folder:
            fill(folder, "a")
        assert len(replaced) == 2
        assert replaced[-1] == last


def test_a_line_is_added_whole_or_not_at_all(tmp_path, no_file_above_4_kb):
    path = tmp_path / "answers.jsonl"
    append_line(path, b"first")
    with pytest.raises(OSError, match=f"^cannot write {path}: the file is too large"):
        append_line(path, b"x" * 5000)
    append_line(path, b"second")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_home_that_does_not_exist_is_one_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/model").as_posix() == "/home/me/model"
    with pytest.raises(FileNotFoundError, match="^~nosuchuser/model: .*write the path without ~"):
        expanded("~nosuchuser/model")
    with pytest.raises(FileNotFoundError):
        mistral.save(small.model(), None, "~nosuchuser/model")


def test_sizes_are_in_decimal_units():
    assert format_bytes(4_367_704_064) == "4.37 GB"
    assert [format_bytes(n) for n in (0, 999, 1000, 2e12)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "2000.00 GB",
    ]


def test_a_text_may_come_from_a_pipe_and_a_device_that_never_ends_is_too_long(tmp_path):
    (tmp_path / "text").write_text("naïve")
    assert read_text(tmp_path / "text", 6) == "naïve"
    for path, largest in ((tmp_path / "text", 5), ("/dev/zero", 1000)):
        with pytest.raises(ValueError, match="it has more than"):
            read_text(path, largest)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("{}",))
    writer.start()
    assert read_text(tmp_path / "pipe", 10) == "{}"
    writer.join()
