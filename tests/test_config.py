import dataclasses
import json
import warnings

import pytest
import small
import torch

import mistral
from mistral.checkpoints.hugging_face import HuggingFaceReader
from mistral.rotary import Rotary

PUBLISHED = {  # window, theta, vocabulary, stop token
    "v0.1": (4096, 1e4, 32000, 2),
    "v0.2": (None, 1e6, 32000, 2),
    "v0.3": (None, 1e6, 32768, 2),
    "instruct-v0.2": (None, 1e6, 32000, 2),
    "hermes-2-pro": (4096, 1e4, 32032, 32000),
}


YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.5,
    "beta_fast": 40.0,
    "beta_slow": 2.0,
    "mscale": 0.5,
    "mscale_all_dim": 0.7,
    "truncate": False,
}


def read_config(folder):
    return HuggingFaceReader(folder).config()


def write_config(folder, **changes):
    """The v0.1 config with changes; a value of ... removes the key."""
    raw = json.loads((small.DATA / "configs/v0.1.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_give_their_numbers(name, tmp_path):
    (tmp_path / "config.json").write_bytes((small.DATA / f"configs/{name}.json").read_bytes())
    config = read_config(tmp_path)
    window, theta, vocab_size, eos = PUBLISHED[name]
    assert (config.sliding_window, config.rope_theta, config.vocab_size) == (
        window,
        theta,
        vocab_size,
    )
    assert (config.head_dim, config.rms_norm_eps, config.eos_token_id) == (128, 1e-5, (eos,))
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (
        32,
        8,
        14336,
    )


def test_parameter_count_and_cache_size_of_the_7b(tmp_path):
    config = read_config(write_config(tmp_path))
    assert config.num_parameters == 7_241_732_096
    assert config.cache_bytes(4096, itemsize=2) == 536_870_912


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_parameter_count_is_that_of_the_modules(changes):
    model = small.model(**changes)
    assert model.config.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": None, "tie_word_embeddings": True, "rope_theta": 1e6}]
)
def test_configs_of_transformers_5_are_read(changes, tmp_path):
    small.save_hf(tmp_path, **changes)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert read_config(tmp_path) == small.config(**changes)


def test_stop_tokens_come_from_generation_config_where_it_names_some(tmp_path):
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": [2, 31999]}'
    )
    assert read_config(tmp_path).eos_token_id == (2, 31999)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    assert read_config(tmp_path).eos_token_id == (2,)


def test_absent_window_is_transformers_default_and_said(tmp_path):
    for given, expected in ((..., 4096), (None, None), (17, 17)):
        reader = HuggingFaceReader(write_config(tmp_path, sliding_window=given))
        assert reader.config().sliding_window == expected
        assert (reader.window_note(reader.config()) is None) == (given is not ...)


def notes_of(folder):
    reader = HuggingFaceReader(folder)
    config = reader.config()
    return config, [*filter(None, [reader.window_note(config)]), *reader.notes()]


def test_an_absent_rope_theta_is_transformers_default_and_said(tmp_path):
    for changes in ({"rope_theta": ...}, {"rope_theta": None, "rope_parameters": {}}):
        config, notes = notes_of(write_config(tmp_path, **changes))
        assert config.rope_theta == 10000.0
        assert len(notes) == 1 and "no rope_theta; taking 10,000" in notes[0]
    config, notes = notes_of(write_config(tmp_path, rope_parameters={"rope_theta": 1e4}))
    assert notes == []


def test_key_value_heads_have_the_defaults_of_transformers(tmp_path):
    # A wrong number is seen at the shapes of the matrices.
    for family, given, expected in (
        ("mistral", ..., 8),
        ("mistral", None, 32),
        ("llama", ..., 32),
        ("llama", None, 32),
        ("llama", 4, 4),
    ):
        folder = write_config(tmp_path, model_type=family, num_key_value_heads=given)
        assert read_config(folder).num_key_value_heads == expected


def test_a_llama_has_no_window_even_if_its_config_names_one(tmp_path):
    for given in (..., None):
        folder = write_config(tmp_path, model_type="llama", sliding_window=given)
        config, notes = notes_of(folder)
        assert (config.sliding_window, notes) == (None, [])
    config, notes = notes_of(write_config(tmp_path, model_type="llama", sliding_window=4096))
    assert config.sliding_window is None
    assert "sliding_window 4096 is not applied, as transformers does" in notes[0]


@pytest.mark.parametrize(("factor", "window"), [(8.0, 65536), (16.0, 131072)])
def test_published_yarn_models_are_read(factor, window, tmp_path):
    # Yarn-Mistral-7b-64k and -128k: `finetuned` and the remote code change nothing.
    folder = write_config(
        tmp_path,
        sliding_window=window,
        auto_map={"AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM"},
        rope_scaling={
            "factor": factor,
            "finetuned": True,
            "original_max_position_embeddings": 8192,
            "type": "yarn",
        },
    )
    config, notes = notes_of(folder)
    assert config.rope_scaling == mistral.RotaryScaling(
        rope_type="yarn", factor=factor, original_max_position_embeddings=8192
    )
    assert (config.sliding_window, notes) == (window, [])


@pytest.mark.parametrize(
    ("scaling", "unused"),
    [
        ({"type": "default", "factor": 4.0}, "factor"),
        ({"type": "linear", "factor": 4.0, "beta_fast": 32, "newer": 1}, "beta_fast, newer"),
        (YARN | {"low_freq_factor": 1.0}, "low_freq_factor"),
    ],
)
def test_keys_that_a_rotary_scaling_does_not_use_are_named(scaling, unused, tmp_path):
    _, notes = notes_of(write_config(tmp_path, rope_scaling=scaling))
    assert len(notes) == 1 and f"does not use {unused}; not applied" in notes[0]


def test_rope_parameters_and_rope_scaling_may_both_say_the_same(tmp_path):
    same = {**YARN, "rope_type": "yarn", "rope_theta": 1e4, "newer": None}
    config, notes = notes_of(write_config(tmp_path, rope_scaling=YARN, rope_parameters=same))
    assert config.rope_scaling.attention_factor == 1.5
    assert notes == []


def test_a_window_that_is_absent_is_warned_about_unless_it_is_overridden(tmp_path):
    for file in (small.DATA / "small").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no sliding_window; taking 4,096") as warned:
        assert mistral.load(tmp_path, device="cpu")[0].config.sliding_window == 4096
    assert warned[0].filename == __file__  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for window in (None, 17):
            model, _ = mistral.load(tmp_path, device="cpu", sliding_window=window)
            assert model.config.sliding_window == window


def test_head_size_may_be_null_or_absent_or_its_own(tmp_path):
    for given, expected in ((None, 128), (..., 128), (64, 64)):
        assert read_config(write_config(tmp_path, head_dim=given)).head_dim == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads must be a whole number"),
        ({"hidden_size": "4096"}, "hidden_size must be a whole number"),
        ({"hidden_size": 10**12}, "hidden_size must be"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_attention_heads": 30}, "multiple of"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"head_dim": 127}, "even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
        ({"rope_theta": -1.0}, "rope_theta must be"),
        ({"sliding_window": 0}, "sliding_window must be"),
        ({"sliding_window": [4096]}, "sliding_window must be"),
        ({"rope_scaling": {"factor": 4.0}}, "rotary scaling has no rope_type, only factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "linear has no factor"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn has no factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rotary scaling 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rotary scaling 'longrope' is not"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' is not supported; lin",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "only full_attention"),
        ({"rope_scaling": "yarn"}, "must be objects or null"),
        ({"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_type is 'linear', and type is"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "differ in attention",
        ),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8.0}}, "differ in factor"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 10000.0 in one place and 1000000",
        ),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 99}, "is 99 in one place"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "a part of the head"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral', and mistral and llama are read"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"eos_token_id": 32000}, "outside the vocabulary"),
        ({"eos_token_id": "x"}, "eos_token_id must be"),
        ({"eos_token_id": {}}, "eos_token_id must be"),
        ({"eos_token_id": [460.0]}, "eos_token_id must be"),
        ({"eos_token_id": True}, "eos_token_id must be"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings must be true or false"),
        ({"rope_theta": 10**400}, "rope_theta must be"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rotary scaling"),
    ],
)
def test_bad_configs_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(mistral.CheckpointError, match=message):
        read_config(write_config(tmp_path, **changes))


@pytest.mark.parametrize("name", [name for name in YARN if name != "type"])
@pytest.mark.parametrize(
    "value",
    [-1, "4", [], {}, float("nan"), float("inf"), 10**400, 10**4000],
    ids=lambda v: str(v)[:5],
)
def test_every_value_of_a_rotary_scaling_is_checked(name, value, tmp_path):
    with pytest.raises(mistral.CheckpointError, match=f"{name} must be"):
        read_config(write_config(tmp_path, rope_scaling=YARN | {name: value}))


@pytest.mark.parametrize("name", [name for name in YARN if name not in ("type", "truncate")])
def test_true_is_not_a_number_of_a_rotary_scaling(name, tmp_path):
    with pytest.raises(mistral.CheckpointError, match=f"{name} must be"):
        read_config(write_config(tmp_path, rope_scaling=YARN | {name: True}))


@pytest.mark.parametrize("name", ["factor", "beta_fast", "beta_slow", "attention_factor"])
@pytest.mark.parametrize("value", [10**28, 1e30, 1e-30])
def test_no_accepted_number_breaks_the_arithmetic(name, value, tmp_path):
    for theta in (10**28, 1e30, 1 + 2e-16):
        raw = YARN | {name: value, "truncate": True}
        scaling = read_config(
            write_config(tmp_path, rope_scaling=raw, rope_theta=theta)
        ).rope_scaling
        assert Rotary(128, float(theta), scaling).frequencies.isfinite().all()


def test_a_number_may_be_a_whole_one_of_any_size(tmp_path):
    config = read_config(write_config(tmp_path, rope_theta=10**28, rms_norm_eps=1))
    assert (config.rope_theta, config.rms_norm_eps) == (1e28, 1.0)
    assert type(config.rope_theta) is float
    assert Rotary(config.head_dim, config.rope_theta).frequencies.isfinite().all()


@pytest.mark.parametrize(
    "value", [0, -1, 2**31 - 1, 2**31, 10**400, 1.5, True, "1", [], {}, float("inf")], ids=repr
)
def test_no_value_of_any_field_gets_past_the_checks(value, tmp_path):
    # Read, then held against the weights of a small checkpoint: only a CheckpointError may come
    # out, and soon.
    original = json.loads((small.DATA / "small/config.json").read_text())
    for file in (small.DATA / "small").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    for name in [*original, "rope_theta", "rope_scaling", "quantization_config"]:
        if name in (
            "architectures",
            "dtype",
            "transformers_version",
            "pad_token_id",
            "initializer_range",
            "use_cache",
        ):
            continue
        (tmp_path / "config.json").write_text(json.dumps(original | {name: value}))
        try:
            model, _ = mistral.load(tmp_path, device="cpu")
        except mistral.CheckpointError as error:
            assert str(tmp_path) in str(error)
        else:
            assert model.config.num_parameters < 1_400_000


@pytest.mark.filterwarnings("ignore:.*has no sliding_window")
@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\xff", "[" * 100_000, '{"model_type": "mistral"}']
)
def test_config_files_that_are_no_config_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(mistral.CheckpointError):
        read_config(tmp_path)


def test_no_field_of_the_papers_model_has_a_default():
    with_default = {
        field.name: field.default
        for field in dataclasses.fields(mistral.Config)
        if field.default is not dataclasses.MISSING
    }
    assert with_default == {"rope_scaling": None}


@pytest.mark.parametrize(
    "scaling",
    [
        mistral.RotaryScaling(rope_type="linear", factor=3.3),
        small.YARN,
        mistral.RotaryScaling(**{k: v for k, v in YARN.items() if k != "type"}, rope_type="yarn"),
    ],
    ids=["linear", "yarn", "every key"],
)
def test_transformers_reads_a_saved_scaling(scaling, tmp_path):
    modeling_mistral = pytest.importorskip("transformers.models.mistral.modeling_mistral")

    from mistral.checkpoints.hugging_face import save

    ours = small.model(torch.float32, rope_scaling=scaling)
    save(ours, None, tmp_path)
    theirs = modeling_mistral.MistralForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    tokens = small.tokens(2, 30)
    assert torch.equal(theirs(tokens, use_cache=False).logits, ours(tokens))
    assert read_config(tmp_path) == ours.config


def test_transformers_reads_what_save_writes(tmp_path):
    transformers = pytest.importorskip("transformers")

    from mistral.checkpoints.hugging_face import save

    config = small.config(vocab_size=32010, eos_token_id=(32000, 2), rope_theta=5e5)
    save(mistral.Mistral(config).to(torch.bfloat16), small.true_tokenizer(), tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert (theirs.head_dim, theirs.sliding_window, theirs.eos_token_id) == (10, 4, [32000, 2])
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**31},
        {"rope_theta": 1.1e30},
        {"rms_norm_eps": 0.9e-30},
        {"tie_word_embeddings": 1},
        {"eos_token_id": (101,)},
    ],
    ids=str,
)
def test_a_config_ends_at_its_limits(changes):
    small.config(vocab_size=2**31 - 1, rope_theta=1e30, rms_norm_eps=1e-30, eos_token_id=(100,))
    with pytest.raises(ValueError, match=next(iter(changes))):
        small.config(**changes)
