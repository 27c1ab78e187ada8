"""What the scripts share, one function at a time."""

import argparse

import common
import pytest
import small

from mistral.chat.answer import SLACK


def parsed(*options):
    parser = common.parser("A script.", "python script.py")
    common.add_sampling_arguments(parser, temperature=0.7)
    return parser.parse_args(list(options))


def test_every_sampling_option_is_a_value_of_sampling():
    options = dict(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.5,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        no_repeat_ngram_size=3,
        seed=11,
    )
    words = []
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    assert vars(common.sampling(parsed(*words))) == options | {"logit_bias": ()}


def test_a_window_is_auto_none_or_a_number():
    assert [common.window(text) for text in ("auto", "none", "1")] == ["auto", None, 1]
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="not auto, none, or a number"):
            common.window(text)


def test_numbers_below_1_are_refused_by_their_flag():
    arguments = argparse.Namespace(device="cpu", max_new_tokens=0)
    with pytest.raises(ValueError, match="--max-new-tokens must be 1 or more, not 0"):
        common.check(arguments)
    common.check(argparse.Namespace(device="cpu", max_new_tokens=1))


def test_an_engine_for_a_chat_has_slack_for_spelled_ends_and_guesses():
    arguments = argparse.Namespace(engine="eager", lookup=8)
    engine, _ = common.open_chat_engine(arguments, small.model(), None)
    assert engine.slack == SLACK


@pytest.mark.parametrize("place", ["a" * 300, "a" * 300 + "/b"])
def test_an_output_whose_name_is_too_long_is_named(place, tmp_path):
    with pytest.raises(ValueError, match="too long|is not a folder"):
        common.check_output(tmp_path / place)
