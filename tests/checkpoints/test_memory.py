"""What fits into memory: the default dtype on a CPU, the messages, and what they call a checkpoint."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import small
import torch

import mistral
from mistral.checkpoints.labels import checkpoint_name
from mistral.engine import memory
from mistral.quantization.packed import Packed

SMALL = small.DATA / "small"
GGUF = small.DATA / "gguf/q4_k_m.gguf"
FLOAT32 = 5_444_608  # bytes of the weights of both
BFLOAT16 = FLOAT32 // 2
CACHE = 2 * 2 * 2 * 32 * 16 * 4  # keys and values, layers, heads, head size, window, float32
COMMIT = "c" * 40
BLOB = "b" * 64


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(memory, "_available_memory", lambda device: count)

    return set_free


def load(path, **arguments):
    """(model, warnings), without the one about the window of a GGUF file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = mistral.load(path, **{"device": "cpu", **arguments})
    texts = [str(warning.message) for warning in caught]
    return model, [text for text in texts if "names no sliding window" not in text]


def size(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def test_float32_is_the_default_on_a_cpu_while_it_fits_with_room_for_a_sequence(free):
    free(FLOAT32 + 2 * CACHE)
    model, notes = load(SMALL)
    assert (model.dtype, notes, size(model)) == (torch.float32, [], FLOAT32)
    free(FLOAT32 + 2 * CACHE - 1)
    model, [note] = load(SMALL)
    assert (model.dtype, size(model)) == (torch.bfloat16, BFLOAT16)
    assert note == (
        "small needs 5.44 MB in float32, the default on a CPU, and does not fit into the free "
        "memory with room for a sequence: it is loaded in bfloat16 (2.72 MB). Less memory: "
        'quantize="q8_0" (1.45 MB) or quantize="q4_0" (831.49 kB), or a quantized GGUF with '
        "packed=True"
    )


def test_the_sequence_that_must_fit_has_4096_tokens(free, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(SMALL, folder)
    config = json.loads((SMALL / "config.json").read_text())
    changes = {"sliding_window": None, "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config | changes))
    needed = FLOAT32 + 2 * CACHE // 16 * 4096
    for count, dtype in ((needed, torch.float32), (needed - 1, torch.bfloat16)):
        free(count)
        assert load(folder)[0].dtype == dtype


def test_the_dtype_of_the_checkpoint_takes_over(free, tmp_path):
    folder = tmp_path / "half"
    model, tokenizer = mistral.load(SMALL, device="cpu")
    from mistral.checkpoints.hugging_face import save

    save(model.half(), tokenizer, folder)
    free(FLOAT32)
    assert load(folder)[0].dtype == torch.float16
    save(model.float(), tokenizer, folder)
    model, notes = load(folder)  # its own dtype is float32: nothing is smaller
    assert (model.dtype, notes) == (torch.float32, [])


def test_a_quantized_gguf_is_unpacked_to_bfloat16_and_packed_is_named(free):
    free(FLOAT32)
    model, [note] = load(GGUF)
    assert model.dtype == torch.bfloat16
    assert note.endswith("Less memory: packed=True (839.74 kB)")
    model, notes = load(GGUF, packed=True)
    assert (model.dtype, notes) == (torch.float32, [])


def test_a_dtype_that_is_asked_for_is_not_changed(free):
    free(FLOAT32)
    model, notes = load(SMALL, dtype=torch.float32)
    assert (model.dtype, notes) == (torch.float32, [])
    free(FLOAT32 - 1)
    with pytest.raises(mistral.NotEnoughMemory, match=r"small in float32 needs 5\.44 MB on cpu"):
        load(SMALL, dtype=torch.float32)


@pytest.mark.parametrize("source", [SMALL, GGUF], ids=["plain", "quantized"])
def test_what_would_fit_is_listed_and_its_bytes_are_right(free, source):
    free(1000)
    with pytest.raises(mistral.NotEnoughMemory) as error:
        load(source, dtype=torch.float32)
    told = str(error.value)
    forms = {
        "dtype=torch.bfloat16": dict(dtype=torch.bfloat16),
        'quantize="q8_0"': dict(quantize="q8_0"),
        'quantize="q4_0"': dict(quantize="q4_0"),
    }
    if source == GGUF:
        forms = {
            "dtype=torch.bfloat16": dict(dtype=torch.bfloat16),
            "packed=True": dict(packed=True),
        }
    assert "it does not fit with" in told
    for text, arguments in forms.items():
        free(10**9)
        needed = size(load(source, **arguments)[0])
        assert f"{text} ({memory.format_bytes(needed)})" in told
        free(needed)
        with pytest.raises(mistral.NotEnoughMemory) as error:
            load(source, dtype=torch.float32)
        assert f"it would fit with {text} (" in str(error.value) or f" or {text} (" in str(
            error.value
        )
        load(source, **arguments)


def test_nothing_is_suggested_that_the_checkpoint_cannot_have(free, tmp_path):
    small.save_hf(tmp_path / "odd", dtype=torch.bfloat16)  # rows of 40: no blocks of 32
    free(100)
    with pytest.raises(mistral.NotEnoughMemory, match="odd in bfloat16 .*; it has no smaller form"):
        small.load_model(tmp_path / "odd")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder like the hub's cache, with a repository, and ollama's folder of blobs."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "models--NousResearch--Hermes-2-Pro-Mistral-7B"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(SMALL, snapshot)
    (repository / "blobs").mkdir()
    shutil.copy(GGUF, repository / "blobs" / BLOB)
    (snapshot / "model.gguf").symlink_to(f"../../blobs/{BLOB}")
    (root / "mine").symlink_to(snapshot)
    (root / "mine.gguf").symlink_to(snapshot / "model.gguf")
    (root / "blobs").mkdir()
    shutil.copy(GGUF, root / "blobs" / f"sha256-{BLOB}")
    return root


HERMES = "models--NousResearch--Hermes-2-Pro-Mistral-7B"


@pytest.mark.parametrize(
    ("where", "path", "name"),
    [
        (".", f"{HERMES}/snapshots/{COMMIT}", "NousResearch/Hermes-2-Pro-Mistral-7B"),
        (".", f"{HERMES}/snapshots/{COMMIT}/", "NousResearch/Hermes-2-Pro-Mistral-7B"),
        (
            ".",
            f"{HERMES}/snapshots/{COMMIT}/model.gguf",
            "NousResearch/Hermes-2-Pro-Mistral-7B/model.gguf",
        ),
        (f"{HERMES}/snapshots/{COMMIT}", ".", "NousResearch/Hermes-2-Pro-Mistral-7B"),
        (f"{HERMES}/snapshots", COMMIT, "NousResearch/Hermes-2-Pro-Mistral-7B"),
        (HERMES, f"blobs/{BLOB}", "NousResearch/Hermes-2-Pro-Mistral-7B"),
        (".", "mine", "mine"),
        (".", "mine/", "mine"),
        (".", "blobs/../mine.gguf", "mine.gguf"),
        (".", f"blobs/sha256-{BLOB}", "Hf"),  # its general.name
    ],
)
def test_messages_name_the_model_and_no_hash(cache, free, monkeypatch, where, path, name):
    monkeypatch.chdir(cache / where)
    free(1000)
    for source in (path, Path(path), os.path.join(Path.cwd(), path)):  # noqa: PTH118
        with pytest.raises(mistral.NotEnoughMemory) as error:
            load(source)
        assert str(error.value).startswith(f"{name} in bfloat16 needs 2.72 MB on cpu, and 1.00 kB")


def test_a_hash_that_says_nothing_gives_way_to_the_folder_above_it(tmp_path):
    folder = tmp_path / "Hermes" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert checkpoint_name(folder) == "Hermes"
    assert checkpoint_name(folder, "owner/name") == "owner/name"
    assert checkpoint_name(tmp_path / BLOB) == BLOB  # a file: there is no other name
    assert checkpoint_name(Path("/")) == "/"


def test_the_note_about_a_window_names_the_file(cache, monkeypatch):
    for path, name in (("mine.gguf", "mine.gguf"), (f"blobs/sha256-{BLOB}", "Hf")):
        with pytest.warns(UserWarning, match=f"^{name} names no sliding window"):
            mistral.load(cache / path, device="cpu")


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Writes the files in which Linux says how much memory there is, in bytes."""

    def write(available, limit, used=0, cached=0):
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(
            f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n"
        )
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\nfile {cached}\nkernel 7\n")
        return memory._available_memory(torch.device("cpu"))

    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.removeprefix("/"))
    return write


def test_free_memory_is_that_of_the_container_without_its_cached_files(system, tmp_path):
    assert system(available=80_000 * 1024, limit="max") == 80_000 * 1024
    assert system(available=80_000 * 1024, limit=10_000_000, used=4_000_000) == 6_000_000
    free = system(available=80_000 * 1024, limit=10_000_000, used=9_000_000, cached=7_000_000)
    assert free == 8_000_000
    assert system(available=1024, limit=10_000_000) == 1024  # the machine has less
    (tmp_path / "sys/fs/cgroup/memory.max").unlink()  # not in a container
    assert memory._available_memory(torch.device("cpu")) == 1024


def test_free_memory_is_that_of_the_process_with_a_limit(system, monkeypatch, tmp_path):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (10_000_000, -1))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text("1000 500 100\n")  # pages
    left = 10_000_000 - 1000 * memory.resource.getpagesize()
    assert system(available=1 << 40, limit="max") == left


def test_a_containers_limit_decides_what_is_loaded(system):
    system(available=1 << 40, limit=FLOAT32 + 1000, used=1000)
    assert load(SMALL)[0].dtype == torch.bfloat16
    system(available=1 << 40, limit=1000, used=10)
    with pytest.raises(mistral.NotEnoughMemory, match="and 990 bytes are free"):
        load(SMALL)


def test_a_model_without_packed_layers_is_what_bfloat16_is(free):
    free(BFLOAT16)
    model, _ = load(SMALL)
    assert not any(isinstance(module, Packed) for module in model.modules())


def test_a_form_that_fits_to_the_byte_is_listed(free):
    free(BFLOAT16)
    with pytest.raises(mistral.NotEnoughMemory, match=r"would fit with dtype=torch\.bfloat16"):
        load(SMALL, dtype=torch.float32)


def test_a_hash_has_32_digits_or_more():
    assert checkpoint_name(Path("/x") / ("b" * 32), "its name") == "its name"
    assert checkpoint_name(Path("/x") / ("b" * 31), "its name") == "b" * 31
