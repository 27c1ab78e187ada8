"""`open_engine` takes what works and says why; a named engine is that one, or a line that tells
what is missing.
"""

import re
import subprocess
import sys
import types

import pytest
import small
import torch

import mistral
import mistral.engine.compiled
import mistral_kernels.cpu
from mistral.quantization.packed import PackedLinear
from mistral.quantization.quantize import KINDS
from mistral_kernels import engines, open_engine, requirements


class WrongLogits(ValueError):
    """In the place of the trial's own, whose file imports Triton."""


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(requirements, "_DRIVER", tmp_path / "none")


@pytest.fixture
def a_gpu(monkeypatch):
    """The model claims to be on a GPU of compute capability 9.0; nothing runs there."""
    monkeypatch.setattr(mistral.Mistral, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(engines, "problem_apart", lambda model, batch_size: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def model(**changes):
    """Of sizes that the kernels can do."""
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return small.model(torch.float32, **(sizes | changes))


COMPILED = types.SimpleNamespace(unpacked_kinds=())


def refusing(message):
    def open_it(model, sizes, pdl=False):
        raise ValueError(message)

    return open_it


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("tried 9 GB")


def test_auto_without_a_gpu_is_the_cpus_engine_or_says_why_not(no_gpu, monkeypatch):
    pytest.importorskip("numba")
    sizes = dict(batch_size=2, max_tokens=9)
    decoder, note = open_engine("auto", model(), **sizes)
    assert type(decoder) is mistral_kernels.cpu.Decoder
    assert (decoder.batch_size, decoder.limit) == (2, 9)
    assert re.fullmatch(r"engine: cpu \(\d+ threads?\): no GPU", note)

    decoder, note = open_engine("auto", model().double(), **sizes)
    assert type(decoder) is mistral.Decoder
    assert note.startswith("engine: eager: no GPU; not cpu: the CPU kernels know no torch.float64")

    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    decoder, note = open_engine("auto", model(), **sizes)
    assert type(decoder) is mistral.Decoder
    assert note == ("engine: eager: no GPU; not cpu: the CPU engine needs numba: pip install numba")


def test_auto_is_eager_where_numba_does_not_run_and_layers_get_their_blocks_back(
    no_gpu, monkeypatch
):
    pytest.importorskip("numba")
    from mistral_kernels.cpu.weights import Weights

    def failing(model, **_):
        Weights(model)  # which regroups the blocks
        raise ImportError("Numba needs NumPy 2.9 or less")

    monkeypatch.setattr(mistral_kernels.cpu, "Decoder", failing, raising=False)
    packed, _ = mistral.load("demo", packed=True)
    decoder, note = open_engine("auto", packed, max_tokens=9)
    assert type(decoder) is mistral.Decoder
    assert "not cpu: the CPU kernels do not run here: ImportError: Numba needs NumPy 2.9" in note
    assert all(m.keeper is None for m in packed.modules() if isinstance(m, PackedLinear))
    with pytest.raises(ValueError, match="update numba, or use another engine"):
        open_engine("cpu", packed, max_tokens=9)


def test_compiling_for_a_cpu_is_said_and_its_progress_passed_on(no_gpu, monkeypatch):
    pytest.importorskip("numba")

    def compiling(model, progress, **_):
        for done in range(3):
            progress(done, 2, "step")

    monkeypatch.setattr(mistral_kernels.cpu, "Decoder", compiling, raising=False)
    said = []
    for name in ("cpu", "auto"):
        said.clear()
        open_engine(name, model(), say=said.append, progress=lambda *call: said.append(call))
        line = "compiling 2 kernels for this CPU; the next start finds them"
        assert said == [line, (0, 2, "step"), (1, 2, "step"), (2, 2, "step")]


def test_slack_and_room_reach_the_decoder():
    decoder, note = open_engine("eager", model(sliding_window=None), max_tokens=9, slack=0)
    assert (decoder.limit, note) == (9, "engine: eager")


def test_a_gpu_that_is_not_used_and_a_driver_that_is_too_old_are_told(
    no_gpu, monkeypatch, tmp_path
):
    monkeypatch.setattr(requirements, "_DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in open_engine("auto", model())[1]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "a newer NVIDIA driver" in open_engine("auto", model())[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_engine("auto", model())[1].endswith(": the model is on cpu")


def test_auto_on_a_gpu_is_the_kernels(a_gpu, monkeypatch):
    opened = types.SimpleNamespace(unpacked_kinds=())
    asked = []
    monkeypatch.setattr(
        engines,
        "_open_kernels",
        lambda model, sizes, pdl=False: asked.append((sizes, pdl)) or (opened, "there"),
    )
    said = []
    decoder, note = open_engine("auto", model(), 3, 10, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("trying the kernels; the first time on a machine")
    assert decoder is opened
    assert asked == [(dict(batch_size=3, max_tokens=10, slack=16), True)]
    assert note == "engine: kernels (there)"


def test_auto_goes_on_to_the_next_that_works_and_says_why(a_gpu, monkeypatch):
    monkeypatch.setattr(engines, "_open_compiled", lambda model, sizes: (COMPILED, "there"))
    decoder, note = open_engine("auto", model(), batch_size=65)
    assert decoder is COMPILED
    assert note.startswith(
        "engine: compile (there); not kernels: the kernels take at most 64 rows at once"
    )
    monkeypatch.setattr(engines, "_open_compiled", refusing("no compiler"))
    monkeypatch.setattr(engines, "Decoder", lambda model, **sizes: "eager")
    decoder, note = open_engine("auto", model(), batch_size=65)
    assert decoder == "eager"
    assert note.startswith("engine: eager; not kernels: the kernels take")
    assert note.endswith("; not compile: no compiler")


def test_what_was_in_planes_for_another_decoder_stays_there(a_gpu, monkeypatch):
    packed = model()
    first, other = (
        PackedLinear(torch.zeros(3, 34, dtype=torch.uint8), KINDS["q8_0"]) for _ in range(2)
    )
    packed.model.layers[0].mlp.up_proj = first
    packed.model.layers[0].mlp.down_proj = other
    keeper = types.SimpleNamespace(blocks=lambda: torch.ones(3, 34, dtype=torch.uint8))
    first.hand_over(keeper)

    def half_way(model, sizes, pdl=False):
        other.hand_over(keeper)
        raise ValueError("the driver is too old")

    monkeypatch.setattr(engines, "_open_kernels", half_way)
    monkeypatch.setattr(engines, "_open_compiled", refusing("packed weights"))
    monkeypatch.setattr(engines, "Decoder", lambda model, **sizes: "eager")
    assert open_engine("auto", packed)[0] == "eager"
    assert first.keeper is keeper
    assert other.keeper is None
    assert other.blocks.all()


def test_auto_goes_on_where_memory_is_short(a_gpu, monkeypatch):
    def no_room(model, sizes, pdl=False):
        raise mistral.NotEnoughMemory("the buffers do not fit")

    monkeypatch.setattr(engines, "_open_kernels", no_room)
    monkeypatch.setattr(engines, "_open_compiled", lambda model, sizes: (COMPILED, "there"))
    decoder, note = open_engine("auto", model())
    assert decoder is COMPILED
    assert note == "engine: compile (there); not kernels: the buffers do not fit"


def test_auto_goes_on_without_triton(a_gpu, monkeypatch):
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(engines, "_open_compiled", lambda model, sizes: (COMPILED, "there"))
    note = open_engine("auto", model())[1]
    assert (
        note
        == "engine: compile (there); not kernels: Triton is not installed: pip install triton (Linux)"
    )


def test_auto_goes_on_where_a_compiled_step_cannot_be_recorded(a_gpu, monkeypatch):
    class CompiledDecoder:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("CUDA error:\n operation not permitted when stream is capturing")

    monkeypatch.setattr(engines, "_open_kernels", refusing("no driver"))
    monkeypatch.setattr(mistral.engine.compiled, "CompiledDecoder", CompiledDecoder)
    monkeypatch.setattr(engines, "Decoder", lambda model, **sizes: "eager")
    decoder, note = open_engine("auto", model())
    assert decoder == "eager"
    assert (
        "not compile: the compiled step does not run here: RuntimeError: CUDA error: operation not"
        in note
    )
    monkeypatch.setattr(CompiledDecoder, "__init__", out_of_memory)
    with pytest.raises(mistral.NotEnoughMemory, match="tried 9 GB"):
        open_engine("compile", model())


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({}, 65, "at most 64 rows at once, not 65: use fewer rows"),
        ({"hidden_size": 40}, 1, "hidden_size to be a multiple of 32, not 40"),
        ({"intermediate_size": 56}, 1, "intermediate_size to be a multiple of 32"),
        ({"head_dim": 8}, 1, "a head_dim of 16, 32"),
        ({"num_attention_heads": 34}, 1, "at most 16 query heads to a key/value head, not 17"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_one_clear_line(changes, rows, message, a_gpu):
    with pytest.raises(ValueError, match=message):
        open_engine("kernels", model(**changes), rows)


@pytest.fixture
def packed():
    return mistral.load(
        small.DATA / "gguf/q8_0.gguf", device="cpu", packed=True, sliding_window=None
    )[0]


def test_packed_models_are_for_the_kernels_and_slow_kinds_are_told(packed, a_gpu, monkeypatch):
    assert requirements.kernels_problem(packed) is None
    decoder = types.SimpleNamespace(unpacked_kinds=["Q2_K", "Q3_K"])
    monkeypatch.setattr(engines, "_open_kernels", lambda *_, pdl=False: (decoder, "there"))
    for name in ("kernels", "auto"):
        note = open_engine(name, packed, max_tokens=9)[1]
        assert note == "engine: kernels (there), Q2_K, Q3_K unpacked at every step: slow"


def test_other_dtypes_are_told():
    with pytest.raises(ValueError, match="know no float64"):
        open_engine("kernels", model().double())


def test_the_machine_is_looked_at(a_gpu, monkeypatch):
    assert requirements.kernels_problem(model()) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or later, not 7.5" in requirements.kernels_problem(model())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "an AMD one" in requirements.kernels_problem(model())
    sys.modules["triton"].__version__ = "3.5.1"
    assert "Triton 3.5.1 is too old, 3.6 is needed" in requirements.kernels_problem(model())
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in requirements.kernels_problem(model())


def test_without_a_gpu_the_kernels_are_refused(no_gpu):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="need an NVIDIA GPU: no GPU"):
        open_engine("kernels", model())


def test_what_no_model_changes_is_known_before_there_is_one(no_gpu, monkeypatch):
    cpu = torch.device("cpu")
    for name in ("auto", "eager", "compile"):
        engines.check_engine(name, cpu, batch_size=99)
    for name in ("auto", "eager"):
        engines.check_engine(name, cpu, packed=True)
    with pytest.raises(ValueError, match="packed weights cannot be compiled"):
        engines.check_engine("compile", cpu, packed=True)
    with pytest.raises(ValueError, match="at most 64 rows at once, not 65"):
        engines.check_engine("kernels", cpu, batch_size=65)
    with pytest.raises(ValueError, match="no engine 'fast'"):
        engines.check_engine("fast", cpu)
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        engines.check_engine("kernels", cpu)
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available() and requirements._triton_problem() is None:
        with pytest.raises(ValueError, match="need an NVIDIA GPU"):
            engines.check_engine("kernels", cpu)


def test_a_gpu_is_checked_before_there_is_a_model(a_gpu, monkeypatch):
    gpu = torch.device("cuda", 0)
    engines.check_engine("kernels", gpu, packed=True, batch_size=16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="8.0 or later, not 7.5"):
        engines.check_engine("kernels", gpu)


def test_whatever_fails_underneath_is_one_line(a_gpu, monkeypatch):
    class Decoder:
        def __init__(self, *args, **kwargs):
            raise RuntimeError(
                "Triton Error [CUDA]:\n the PTX was compiled with an unsupported toolchain"
            )

    trial = types.SimpleNamespace(
        WrongLogits=WrongLogits,
        expected_logits=lambda model: None,
        try_out=lambda decoder, expected: 0.0,
    )
    monkeypatch.setitem(
        sys.modules, "mistral_kernels.decoder", types.SimpleNamespace(Decoder=Decoder)
    )
    monkeypatch.setitem(sys.modules, "mistral_kernels.trial", trial)
    with pytest.raises(
        ValueError, match="an unsupported toolchain; update the NVIDIA driver"
    ) as info:
        open_engine("kernels", model())
    assert "\n" not in str(info.value)
    monkeypatch.setattr(Decoder, "__init__", out_of_memory)
    with pytest.raises(mistral.NotEnoughMemory, match="tried 9 GB"):
        open_engine("kernels", model())


class Trial:
    """In the place of the kernels' decoder and of its trial.

    done    what was asked of them, in this order
    faults  what the trial raises, with dependent launch (True) and without
    """

    def __init__(self):
        self.done = []
        self.faults = {}
        done = self.done

        class Decoder:
            unpacked_kinds = ()

            def __init__(self, model, batch_size, max_tokens, slack, pdl=False):
                self.pdl = pdl
                done.append("made")

        self.Decoder = Decoder

    def expected_logits(self, model):
        self.done.append("asked")
        return "numbers"

    def try_out(self, decoder, expected):
        self.done.append(("tried", expected, decoder.pdl))
        if fault := self.faults.get(decoder.pdl):
            raise fault
        return 0.0123


@pytest.fixture
def trial(a_gpu, monkeypatch):
    made = Trial()
    made.WrongLogits = WrongLogits
    monkeypatch.setitem(sys.modules, "mistral_kernels.decoder", made)
    monkeypatch.setitem(sys.modules, "mistral_kernels.trial", made)
    monkeypatch.setattr(engines, "_open_compiled", lambda model, sizes: (COMPILED, "there"))
    return made


EARLY = (
    "engine: kernels (CUDA sm_90, Triton 3.6, dependent launch, which another process has tried "
    "first, logits 1.2% from eager's)"
)
PLAIN = "engine: kernels (CUDA sm_90, Triton 3.6, logits 1.2% from eager's)"


def test_kernels_are_tried_beside_what_the_model_gave_before_them(trial):
    decoder, note = open_engine("kernels", model())
    assert type(decoder) is trial.Decoder
    assert note == PLAIN
    assert trial.done == ["asked", "made", ("tried", "numbers", False)]
    # Wrong logits are not the driver's fault, and a fault of the driver is not ours.
    trial.faults = dict.fromkeys((True, False), WrongLogits("their logits are 140% away"))
    decoder, note = open_engine("auto", model())
    assert decoder is COMPILED
    assert "not kernels: the kernels compute something else here: their logits are 140%" in note
    assert "driver" not in note
    trial.faults = dict.fromkeys((True, False), ValueError("no cubin"))
    assert (
        "the kernels do not run here: ValueError: no cubin; update"
        in open_engine("auto", model())[1]
    )


def test_auto_launches_early_if_that_passes_the_trial(trial):
    decoder, note = open_engine("auto", model())
    assert decoder.pdl
    assert note == EARLY
    assert trial.done == ["asked", "made", ("tried", "numbers", True)]


def test_auto_launches_plainly_if_another_process_fails_with_dependent_launch(trial, monkeypatch):
    asked = []
    failure = "a trial in another process failed: CUDA error: an illegal memory access"
    monkeypatch.setattr(engines, "problem_apart", lambda *given: asked.append(given) or failure)
    tried = model()
    decoder, note = open_engine("auto", tried, batch_size=3)
    assert asked == [(tried, 3)]
    assert not decoder.pdl
    # Nothing was launched early in this process.
    assert [pdl for what, *_, pdl in trial.done if what == "tried"] == [False]
    assert note == f"{PLAIN}; not kernels with dependent launch: {failure}"


def test_a_gpu_that_takes_no_more_work_is_told_and_no_other_engine_is_tried(trial, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    trial.faults = {True: RuntimeError("CUDA error: an illegal address")}
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(engines, "_open_compiled", lambda *_: pytest.fail("it cannot run"))
    with pytest.raises(ValueError, match="takes no more work from this process .*illegal address"):
        open_engine("auto", model())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            WrongLogits("their logits are nan% away"),
            "the kernels compute something else here: their logits are nan% away; use another "
            "engine, and please report it",
        ),
        (
            RuntimeError("CUDA error:\n invalid argument"),
            "the kernels do not run here: RuntimeError: CUDA error: invalid argument; update the "
            "NVIDIA driver and Triton (3.6 needs a C compiler, gcc), or use another engine",
        ),
    ],
    ids=["wrong", "raises"],
)
def test_auto_launches_plainly_if_the_early_trial_fails_and_says_why(fault, reason, trial):
    trial.faults = {True: fault}
    decoder, note = open_engine("auto", model())
    assert not decoder.pdl
    assert note == f"{PLAIN}; not kernels with dependent launch: {reason}"


def test_where_neither_launch_passes_both_reasons_are_told(trial):
    trial.faults = {True: ValueError("no early cubin"), False: WrongLogits("140% away")}
    decoder, note = open_engine("auto", model())
    assert decoder is COMPILED
    assert re.fullmatch(
        r"engine: compile \(there\); not kernels with dependent launch: .* no early cubin; .*; "
        r"not kernels: the kernels compute something else here: 140% away; .*",
        note,
    )


def test_memory_that_is_too_small_for_one_kind_of_launch_is_so_for_both(trial):
    trial.faults = {True: torch.OutOfMemoryError("tried 9 GB")}
    decoder, note = open_engine("auto", model())
    assert decoder is COMPILED
    assert (
        note == "engine: compile (there); not kernels: the kernels' buffers do not fit: tried 9 GB"
    )
    assert len(trial.done) == 3


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_a_gpu_without_dependent_launch_is_not_asked_for_it(capability, trial, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decoder, note = open_engine("auto", model())
    assert not decoder.pdl
    assert "dependent" not in note
    assert len(trial.done) == 3


def test_more_rows_than_one_pass_takes_are_launched_plainly(trial):
    decoder, note = open_engine("auto", model(), batch_size=17)
    assert (decoder.pdl, note) == (False, PLAIN)
    assert open_engine("auto", model(), batch_size=16)[0].pdl


def test_blocks_that_the_early_trial_has_regrouped_are_given_back_before_the_plain_one(
    a_gpu, packed, monkeypatch
):
    layer = packed.model.layers[0].mlp.up_proj
    blocks = layer.blocks
    keeper = types.SimpleNamespace(blocks=lambda: blocks)
    opened = []

    def open_it(model, sizes, pdl=False):
        opened.append((pdl, layer.keeper))
        layer.hand_over(keeper)
        if pdl:
            raise ValueError("no")
        return COMPILED, "there"

    monkeypatch.setattr(engines, "_open_kernels", open_it)
    open_engine("auto", packed, max_tokens=9)
    assert opened == [(True, None), (False, None)]


def test_an_unknown_engine_is_refused():
    with pytest.raises(
        ValueError, match="no engine 'fast'; there are auto, eager, compile, kernels"
    ):
        open_engine("fast", model())


def test_importing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import mistral_kernels; "
        "print(mistral_kernels.open_engine.__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=small.ROOT
    )
    assert result.stdout.strip() == "open_engine", result.stderr


@pytest.mark.slow
def test_the_kernels_decoder_without_triton_says_what_is_missing():
    code = "import sys; sys.modules['triton'] = None; from mistral_kernels import Decoder"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=small.ROOT
    )
    assert result.stderr.endswith("mistral_kernels.Decoder needs Triton: pip install triton\n")
