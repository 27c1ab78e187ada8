import dataclasses
import json
import warnings

import pytest
import small
import torch

import mistral
from mistral.checkpoints.hugging_face import HuggingFaceReader

PUBLISHED = {  # window, theta, vocabulary, stop token
    "v0.1": (4096, 1e4, 32000, 2),
    "v0.2": (None, 1e6, 32000, 2),
    "v0.3": (None, 1e6, 32768, 2),
    "instruct-v0.2": (None, 1e6, 32000, 2),
    "hermes-2-pro": (4096, 1e4, 32032, 32000),
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


def test_a_window_that_is_absent_is_warned_about_unless_it_is_overridden(tmp_path):
    for file in (small.DATA / "small").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no sliding_window; taking 4096") as warned:
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
        ({"rope_theta": ...}, "rope_theta is missing"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
        ({"num_key_value_heads": ...}, "num_key_value_heads is missing"),
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
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary scaling"),
        ({"rope_scaling": {"factor": 4.0}}, "rotary scaling"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rotary scaling"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
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


def test_no_field_has_a_default():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(mistral.Config))


def test_transformers_reads_what_save_writes(tmp_path):
    from transformers import AutoConfig

    from mistral.checkpoints.hugging_face import save

    config = small.config(vocab_size=32010, eos_token_id=(32000, 2), rope_theta=5e5)
    save(mistral.Mistral(config).to(torch.bfloat16), small.true_tokenizer(), tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert (theirs.head_dim, theirs.sliding_window, theirs.eos_token_id) == (10, 4, [32000, 2])
    assert read_config(tmp_path) == config
