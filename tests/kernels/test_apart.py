"""What another process tries dependent launches with, and what becomes of its answer."""

import pickle
import subprocess
import sys
import types

import pytest
import small
import torch
from test_packed_decoder import packed_model

import mistral
from mistral.quantization.packed import Packed, TiedOutput
from mistral_kernels import apart

CPU = torch.device("cpu")


def kinds(model):
    return {name: layer.kind for name, layer in model.named_modules() if isinstance(layer, Packed)}


def test_a_plain_model_has_one_layer_and_the_same_widths():
    model = small.model(torch.bfloat16, num_hidden_layers=3)
    shape = pickle.loads(pickle.dumps(apart.shape_of(model, 4)))
    assert (shape.batch_size, shape.kinds, shape.tied) == (4, {}, False)
    other = apart.model_of(shape, CPU)
    assert other.config.num_hidden_layers == 1
    assert other.dtype == torch.bfloat16
    for name, parameter in other.named_parameters():
        assert parameter.shape == model.get_parameter(name).shape
        assert parameter.isfinite().all() and parameter.any()


def test_a_mixture_has_a_layer_of_each_kind():
    model = packed_model(dict(other="Q4_K", v_proj="Q6_K"), num_hidden_layers=3)
    first, second, third = model.model.layers
    third.self_attn.v_proj = third.self_attn.k_proj  # all of one type: the second kind of layer
    other = apart.model_of(apart.shape_of(model, 1), CPU)
    assert [kinds(layer) for layer in other.model.layers] == [kinds(first), kinds(third)]
    assert kinds(other)["model.embed_tokens"] == kinds(model)["model.embed_tokens"]
    assert kinds(other)["lm_head"] == kinds(model)["lm_head"]
    # It computes: zeros.
    assert other(torch.tensor([[3, 4]])).isfinite().all()


def test_a_tied_output_stays_tied():
    model = packed_model(dict(other="Q8_0"))
    model.lm_head = TiedOutput(model.model.embed_tokens)
    other = apart.model_of(apart.shape_of(model, 1), CPU)
    assert other.lm_head.embedding is other.model.embed_tokens


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(mistral.Mistral, "device", torch.device("cuda", 1))
    return small.model(torch.float32)


def ended(code, errors):
    return lambda command, **options: types.SimpleNamespace(returncode=code, stderr=errors)


def test_the_last_line_of_its_errors_is_the_problem(model, monkeypatch):
    monkeypatch.setattr(subprocess, "run", ended(0, b"a warning"))
    assert apart.problem_apart(model, 1) is None
    monkeypatch.setattr(subprocess, "run", ended(1, b"Traceback\nRuntimeError: illegal address\n"))
    problem = "a trial in another process failed: RuntimeError: illegal address"
    assert apart.problem_apart(model, 1) == problem
    monkeypatch.setattr(subprocess, "run", ended(-11, b""))
    assert apart.problem_apart(model, 1).endswith("failed: it ended with -11")


def test_a_process_that_hangs_or_does_not_start_is_a_problem(model, monkeypatch):
    def hangs(command, **options):
        assert command[-1] == "1"  # the number of the GPU
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert apart.problem_apart(model, 1).endswith("took more than 300 s")
    monkeypatch.undo()
    monkeypatch.setattr(mistral.Mistral, "device", torch.device("cuda", 1))
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert "cannot be started" in apart.problem_apart(model, 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU it fails")
def test_the_process_begins_its_trial(model):
    assert "cuda" in apart.problem_apart(model, 1).lower()
