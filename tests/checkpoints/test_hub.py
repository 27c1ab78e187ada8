"""Names on a hub, against a small hub of our own on the loopback interface."""

import json
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import small

from mistral import CheckpointError
from mistral.checkpoints import hub as hub_module
from mistral.checkpoints.hub import choose_files, is_name, snapshot

SMALL = small.DATA / "small"
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers the two questions that huggingface_hub asks: which files there are, and for a
    file.
    """

    repositories: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "page":  # a proxy, which answers everything
            return self.send(200, {}, b"<html>please log in</html>", body)
        if parts[0].isdecimal():  # trouble
            return self.send(int(parts[0]), {}, b"", body)
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            revision = parts[5] if len(parts) > 5 else "main"
            if repo not in self.repositories:
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
            if revision not in ("main", COMMIT):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
            files = [{"rfilename": name} for name in self.repositories[repo]]
            return self.send(
                200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode()
            )
        repo = "/".join(parts[:2])
        name = "/".join(parts[4:])
        data = self.repositories.get(repo, {}).get(name)
        if data is None:
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        if body:
            self.asked.append(name)
        return self.send(
            200, {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data, body
        )

    def send(self, code, headers, data, body=True):
        self.send_response(code)
        for name, value in (
            headers | {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


# huggingface_hub reads its settings when it is imported, so each call of `run` has a process of its
# own: a fork of this one, which has imported the rest.
LOADER = """
import contextlib, importlib, json, os, sys, warnings
import safetensors.torch, sentencepiece, tokenizers, torch, tqdm
for name in "httpx2 httpcore2 anyio h11 idna truststore yaml filelock".split():
    with contextlib.suppress(ImportError):  # what huggingface_hub imports
        importlib.import_module(name)
warnings.simplefilter("ignore")
for line in sys.stdin:
    loads, environment = json.loads(line)
    if os.fork():
        print("status", os.wait()[1], flush=True)
        continue
    os.environ.update(environment)
    import mistral
    for source, options in loads:
        try:
            model, tokenizer = mistral.load(source, device="cpu", **options)
            print("ok", model.config.num_parameters, tokenizer.vocab_size)
        except mistral.MistralError as error:
            print("error", error)
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def loader():
    command = [sys.executable, "-c", LOADER]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **streams) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(hub, loader, tmp_path):
    """Load names in a process of its own, whose hub is ours; returns a line for each."""

    def run(*loads, **environment):
        Hub.asked.clear()
        variables = {
            "HF_ENDPOINT": hub,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        print(json.dumps([loads, variables]), file=loader.stdin, flush=True)
        lines = []
        while not (line := loader.stdout.readline()).startswith("status"):
            assert line, "the process has ended"
            lines.append(line.removesuffix("\n"))
        assert line == "status 0\n", lines
        return lines

    return run


@pytest.fixture(autouse=True)
def repositories():
    files = {
        file.name: file.read_bytes()
        for file in SMALL.iterdir()
        if file.name not in ("tokens.json", "expected.npz")
    }
    q8 = (small.DATA / "gguf/q8_0.gguf").read_bytes()
    Hub.repositories = {
        # As v0.3 is: the weights twice, and more
        "some/mistral": files
        | {"consolidated.safetensors": b"x", "params.json": b"{}", "README.md": b"x"},
        "some/mistral-GGUF": {
            "m.Q8_0.gguf": q8,
            "m.Q4_K_M.gguf": (small.DATA / "gguf/q4_k_m.gguf").read_bytes(),
        },
        "some/half-GGUF": {"m.Q8_0-00001-of-00002.gguf": b"x"},
        "some/one-gguf": {"m.gguf": q8, "README.md": b"x"},
        "some/nothing": {"README.md": b"x"},
    }


def test_a_repository_is_loaded_and_only_what_is_needed_is_fetched(run):
    (line,) = run(("some/mistral", {}))
    assert line.startswith("ok ")
    assert sorted(set(Hub.asked)) == sorted(
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.model",
            "tokenizer_config.json",
        ]
        + ["added_tokens.json"]
    )


def test_a_quantisation_is_chosen_by_name(run):
    lines = run(
        ("some/mistral-GGUF:Q4_K_M", {}), ("some/mistral-GGUF:q8_0", {}), ("some/one-gguf", {})
    )
    assert all(line.startswith("ok ") for line in lines), lines
    assert sorted(set(Hub.asked)) == ["m.Q4_K_M.gguf", "m.Q8_0.gguf", "m.gguf"]


def test_what_cannot_be_had_is_said_with_what_there_is(run):
    lines = run(
        ("some/mistral-GGUF", {}),
        ("some/mistral-GGUF:Q6_K", {}),
        ("some/mistral:Q4_K_M", {}),
        ("some/half-GGUF:Q8_0", {}),
        ("some/absent", {}),
        ("some/mistral", {"revision": "v9"}),
        ("some/nothing", {}),
    )
    for line, part in zip(
        lines,
        (
            "has several; name one as some/mistral-GGUF:Q4_K_M. There is: m.Q4_K_M, m.Q8_0",
            "some/mistral-GGUF:Q6_K is not there",
            "some/mistral:Q4_K_M has no GGUF file",
            "some/half-GGUF:Q8_0 has no whole GGUF file",
            "no repository some/absent",
            "some/mistral has no revision 'v9'",
            "has no config.json with weights",
        ),
        strict=True,
    ):
        assert line.startswith("error")
        assert part in line


def test_the_cache_serves_offline_and_without_a_hub(run):
    assert run(("some/mistral", {"revision": COMMIT}), ("some/mistral", {}))[1].startswith("ok ")
    assert run(("some/mistral", {}), HF_HUB_OFFLINE="1")[0].startswith("ok ")
    assert Hub.asked == []
    closed = "http://127.0.0.1:9"  # no server listens there
    lines = run(("some/mistral", {}), ("some/mistral-GGUF:Q8_0", {}), HF_ENDPOINT=closed)
    assert lines[0].startswith("ok ")
    assert "is not in the cache, and the hub cannot be reached" in lines[1]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/429", "too many requests (429): wait, or set HF_TOKEN"),
        pytest.param("/503", "the hub failed (503): try again later", marks=pytest.mark.slow),
        pytest.param("/401", "HF_TOKEN", marks=pytest.mark.slow),
        pytest.param("/page", "a proxy or a login page", marks=pytest.mark.slow),
    ],
)
def test_the_reason_of_no_answer_is_said_and_the_cache_is_used(run, hub, place, reason):
    (line,) = run(("some/mistral", {}), HF_ENDPOINT=hub + place)
    assert reason in line
    assert run(("some/mistral", {}))[0].startswith("ok ")
    if place != "/401":
        assert run(("some/mistral", {}), HF_ENDPOINT=hub + place)[0].startswith("ok ")


@pytest.mark.parametrize(
    "absent", ["tokenizer.model", pytest.param("model.safetensors", marks=pytest.mark.slow)]
)
def test_half_a_cache_is_not_the_repositorys_fault(run, tmp_path, absent):
    assert run(("some/mistral", {}))[0].startswith("ok ")
    (snapshot,) = tmp_path.glob("hub/models--*/snapshots/*")
    (snapshot / absent).unlink()
    (line,) = run(("some/mistral", {}), HF_HUB_OFFLINE="1")
    assert "the copy of some/mistral in the cache is not complete" in line
    assert "HF_HUB_OFFLINE is set" in line
    assert absent in line
    (tmp_path / "hub/models--some--mistral/blobs/x").touch()
    (snapshot / absent).symlink_to("../../blobs/gone")
    assert "is a link to" in run(("some/mistral", {}), HF_HUB_OFFLINE="1")[0]


def test_addresses_and_files_are_understood(run, hub):
    lines = run(
        ("https://huggingface.co/some/mistral", {}),
        ("https://huggingface.co/some/mistral/tree/main", {}),
        (f"{hub}/some/mistral-GGUF/resolve/main/m.Q8_0.gguf?download=true", {}),
        ("hf.co/some/mistral-GGUF:Q8_0", {}),
        ("some/mistral-GGUF/m.Q4_K_M.gguf", {}),
        ("https://huggingface.co/some/mistral/blob/main/config.json", {}),
        ("some/mistral-GGUF/other.gguf", {}),
        ("some/absent/", {}),
    )
    assert all(line.startswith("ok ") for line in lines[:5]), lines
    assert "is one file of a checkpoint: name some/mistral" in lines[5]
    assert "has no other.gguf; its GGUF files: m.Q8_0.gguf, m.Q4_K_M.gguf" in lines[6]
    assert "there is no file or folder some/absent/ here, and no repository" in lines[7]


def test_an_adapter_is_named_with_its_base(run):
    base = json.dumps({"base_model_name_or_path": "some/mistral"}).encode()
    Hub.repositories["some/lora"] = {
        "adapter_config.json": base,
        "adapter_model.safetensors": b"x",
    }
    (line,) = run(("some/lora", {}))
    assert "some/lora is a LoRA adapter (adapter_config.json)" in line
    assert "merge it into some/mistral" in line


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "the disk is full: free space"),
        (PermissionError(13, "Permission denied"), "the cache cannot be written"),
        (OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "certificate is not trusted"),
        (OSError("[Errno -2] Name or service not known"), "no such host: no network"),
        (TimeoutError("The read operation timed out"), "no answer in time"),
        (ConnectionRefusedError(111, "Connection refused"), "no connection"),
    ],
)
def test_the_cause_of_an_error_is_found(error, reason):
    wrapped = RuntimeError("Please check your connection")
    wrapped.__cause__ = error
    assert reason in hub_module._reason(wrapped)


FILES = [
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "sub/model-Q8_0-00001-of-00002.gguf",
    "sub/model-Q8_0-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("quantisation", "expected"),
    [("Q4_K_M", FILES[:1]), ("q4_k_s", FILES[1:2]), ("Q8_0", FILES[2:])],
)
def test_split_sets_are_fetched_whole(quantisation, expected):
    assert choose_files("a/b", FILES, quantisation, None) == expected


@pytest.mark.parametrize("kind", ["Q8_0", "IQ4_XS", "TQ2_0", "F16", "BF16", "MXFP4", "NVFP4"])
def test_a_quantisation_may_follow_an_underscore(kind):
    assert choose_files("a/b", [f"model_{kind}.gguf", "model_x.gguf"], kind, None) == [
        f"model_{kind}.gguf"
    ]


@pytest.mark.parametrize("quantisation", ["K_M", "Q4", "4_K_M", "Q8"])
def test_a_part_of_a_quantisation_is_not_enough(quantisation):
    with pytest.raises(
        CheckpointError, match="There is: model-Q4_K_M, model-Q4_K_S, sub/model-Q8_0"
    ):
        choose_files("a/b", FILES, quantisation, None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["m.Q8_0.gguf", "m.Q8_0-00001-of-00002.gguf"],
            ["m.Q8_0.gguf"],
        ),  # a set that is not whole does not count
        (["Q8_0/model.gguf", "Q4_0/model.gguf"], ["Q8_0/model.gguf"]),
        (["hermes_Q8_0.gguf", "hermes_Q4_0.gguf"], ["hermes_Q8_0.gguf"]),
    ],
)
def test_names_in_use_are_understood(files, expected):
    assert choose_files("a/b", files, "Q8_0", None) == expected


def test_a_set_that_is_not_whole_is_not_chosen():
    part = "model-Q8_0-00001-of-00002.gguf"
    with pytest.raises(CheckpointError, match="a/b has no whole GGUF file"):
        choose_files("a/b", [part], "Q8_0", None)
    assert choose_files("a/b", [part, "other.gguf"], None, None) == ["other.gguf"]


def test_a_projector_is_chosen_if_there_is_nothing_else():
    projector = "mmproj-model-Q8_0.gguf"
    assert choose_files("a/b", [projector], None, None) == [projector]
    assert choose_files("a/b", [projector, "model-Q8_0.gguf"], None, None) == ["model-Q8_0.gguf"]


def test_a_revision_that_the_cache_does_not_have_is_not_another_one(tmp_path):
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    assert snapshot(tmp_path).name == snapshot(tmp_path, "abc").name == "abc"
    with pytest.raises(CheckpointError, match="no snapshot of 'v9'; name one of .*abc"):
        snapshot(tmp_path, "v9")
    (tmp_path / "snapshots/def").mkdir()
    with pytest.raises(CheckpointError, match="no snapshot of 'main'"):
        snapshot(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs/v9").write_text("def\n")
    assert snapshot(tmp_path, "v9").name == "def"


@pytest.mark.parametrize("places", [{"x": 1}, {"x": "../../evil"}, [], {}])
def test_hostile_indexes_are_refused(places, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": places}))
    files = ["config.json", "model.safetensors.index.json", "tokenizer.model"]
    with pytest.raises(CheckpointError, match="no weight_map of file names|is not a file name"):
        choose_files("a/b", files, None, lambda name: tmp_path / "index.json")


def test_nothing_is_fetched_when_a_file_is_missing():
    for files in (
        ["config.json", "model.safetensors"],
        ["params.json"],
        ["params.json", "consolidated.safetensors"],
    ):
        with pytest.raises(CheckpointError, match="has"):
            choose_files("a/b", files, None, None)


def test_shards_are_those_of_the_index(tmp_path):
    index = tmp_path / "index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
        )
    )
    files = [
        "config.json",
        "model.safetensors.index.json",
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]
    files.append("tokenizer.model")
    assert choose_files("a/b", files, None, lambda name: index) == [
        *(
            "config.json",
            "model.safetensors.index.json",
            "a.safetensors",
            "b.safetensors",
            "tokenizer.model",
        )
    ]


def test_names_and_paths_are_told_apart():
    assert all(
        map(is_name, ["a/b", "NousResearch/Hermes-2-Pro-Mistral-7B-GGUF:Q4_K_M", "a.b/c_d-e"])
    )
    assert not any(map(is_name, ["a", "a/b/c", "/a/b", "a/b:", "C:\\a", "a b/c", "../a/b"]))


def test_the_files_of_a_tokenizer_are_fetched():
    files = ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
    others = ["chat_template.jinja", "additional_chat_templates/rag.jinja"]
    expected = {"config.json", "model.safetensors", "tokenizer.json", *others}
    assert set(choose_files("a/b", files + others, None, None)) == expected
    with pytest.raises(CheckpointError, match="no tokenizer.model and no tokenizer.json"):
        choose_files("a/b", files[:2], None, None)
