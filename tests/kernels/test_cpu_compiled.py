"""Kernels by name: compiled by workers, kept on disk, loaded without numba."""

import shutil
import subprocess
import sys
import threading

import pytest

numba = pytest.importorskip("numba")

from mistral_kernels.cpu import compiled  # noqa: E402
from mistral_kernels.cpu.compiler import object_code, part  # noqa: E402

SMALL = "storing of float32"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded: a first start."""
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "_loaded", {})
    return tmp_path


@pytest.fixture
def copying(monkeypatch):
    """Files come from the user's cache: workers take a second to start."""
    compiled.prepare([SMALL])
    source = compiled._folder()

    def copy(names, folder):
        for name in names:
            shutil.copy(source / SMALL, folder / name)
            yield name

    monkeypatch.setattr(compiled, "_compile", copy)


def progress_of(names):
    """What `prepare` says while it loads these kernels."""
    calls = []
    compiled.prepare(names, lambda *call: calls.append(call))
    return calls


def test_workers_compile_and_the_next_start_finds_it(cache):
    names = [SMALL, "storing of bfloat16"]
    calls = progress_of([*names, SMALL])
    assert [call[:2] for call in calls] == [(0, 2), (1, 2), (2, 2)]
    assert {call[2] for call in calls} == {"", *names}
    assert sorted(file.name for file in cache.iterdir()) == sorted(names)
    compiled._loaded.clear()
    compiled.prepare(names, pytest.fail)
    assert compiled._loaded.keys() == set(names)


def test_a_damaged_file_is_compiled_again(copying, cache):
    compiled.prepare([SMALL])
    whole = (cache / SMALL).read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        (cache / SMALL).write_bytes(damaged)
        compiled._loaded.clear()
        assert progress_of([SMALL]) == [(0, 1, ""), (1, 1, SMALL)]
        assert (cache / SMALL).read_bytes() == whole


def test_what_another_process_compiles_meanwhile_is_taken(monkeypatch, tmp_path):
    compiled.prepare([SMALL])
    whole = (compiled._folder() / SMALL).read_bytes()
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "_loaded", {})
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # nothing is compiled here
    compiled.prepare([SMALL], lambda *_: (tmp_path / SMALL).write_bytes(whole))
    assert SMALL in compiled._loaded


def test_without_a_folder_everything_is_compiled_at_every_start(copying, cache, monkeypatch):
    monkeypatch.setattr(compiled, "_folder", lambda: None)
    for _ in range(2):
        assert len(progress_of([SMALL])) == 2
        assert compiled.address(SMALL) > 0
        compiled._loaded.clear()


def test_what_the_compiler_says_is_told(cache):
    with pytest.raises(RuntimeError, match="'no kernel' cannot be compiled: KeyError: 'no kernel'"):
        compiled.prepare(["no kernel"])


def test_a_compiler_that_ends_is_told_and_leaves_no_thread(cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="cannot be compiled: the compiler ended"):
        compiled.prepare(["a", "b", "c"])
    for thread in threading.enumerate():
        if thread.name.startswith("mistral-compile"):
            thread.join(timeout=60)
    assert threading.active_count() == before


def test_compiled_code_refers_to_nothing_of_python():
    compiled.prepare(["step", "attention of float32"])
    for name in ("step", "attention of float32"):
        data = (compiled._folder() / name).read_bytes()
        assert not any(word in data for word in (b"Py", b"NRT_", b"numba_"))


def test_a_division_by_zero_raises_nothing():
    def divide(a, b):
        return a // b + a % b

    code, arguments = object_code(divide)
    assert arguments == 2
    assert b"Py" not in code
    inner = part(divide)

    @numba.njit
    def call(a, b):
        return inner(a, b)

    assert (call(7, 2), call(7, 0)) == (4, 0)


def test_a_process_that_decodes_imports_no_numba():
    script = (
        "import sys, mistral; from mistral_kernels.cpu import Decoder\n"
        "decoder = Decoder(mistral.load('demo', packed=True)[0])\n"
        "decoder.prefill([list(range(3, 60))])\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_other_sources_have_a_cache_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    versions = []
    for text in ("a", "b", "a"):
        (tmp_path / "lanes.py").write_text(text)
        versions.append(compiled._version())
    assert versions[0] == versions[2] != versions[1]


def test_other_processors_and_versions_have_a_cache_of_their_own(monkeypatch):
    versions = [compiled._version()]
    monkeypatch.setattr(compiled.llvm, "get_host_cpu_name", lambda: "another")
    versions.append(compiled._version())
    features = compiled.llvm.get_host_cpu_features()
    more = type(features)({**features, "another": True})
    monkeypatch.setattr(compiled.llvm, "get_host_cpu_features", lambda: more)
    versions.append(compiled._version())
    monkeypatch.setattr(compiled.metadata, "version", lambda package: "0.99")
    versions.append(compiled._version())
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    versions.append(compiled._version())
    monkeypatch.setenv("NUMBA_ENABLE_AVX", "0")
    versions.append(compiled._version())
    assert len(set(versions)) == 6


def test_a_home_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    compiled._folder.cache_clear()
    taken = tmp_path / "file"
    taken.write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(taken))
    try:
        assert "set NUMBA_CACHE_DIR" in compiled.cache_problem()
    finally:
        compiled._folder.cache_clear()
