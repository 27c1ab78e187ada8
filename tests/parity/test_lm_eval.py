"""The lm-evaluation-harness adapter beside the harness's own `hf` model: the same answers on a
small checkpoint.
"""

import functools
import json
import shutil
import sys
import tomllib

import pytest
import small
import torch
from benchmark_parts.served import Serving, served
from safetensors.torch import load_file, save_file

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # `hf` needs it

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import decoders, normalizers, processors  # noqa: E402
from transformers.convert_slow_tokenizer import generate_merges  # noqa: E402

import mistral  # noqa: E402
from mistral.chat.formats import encode_chat  # noqa: E402
from mistral.evaluation import harness  # noqa: E402
from mistral.evaluation.harness import MistralLM  # noqa: E402

TASKS = small.DATA / "lm_eval"
END = 460  # <|im_end|>


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint that reads 64 tokens and never prefers bytes, control tokens or pads to
    words.
    """
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = dict(vocab_size=480, max_position_embeddings=64, sliding_window=8, eos_token_id=(END,))
    small.save_hf(folder, initializer_range=0.15, **sizes)
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(small.DATA / "small" / name, folder)
    weights = load_file(folder / "model.safetensors")
    tokenizer = mistral.load(small.DATA / "small")[1]
    words = [kind == 1 for _, _, kind in tokenizer.vocabulary()]
    weights["lm_head.weight"][[id for id in range(480) if id >= len(words) or not words[id]]] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def their_tokenizer():
    """The checkpoint's tokenizer as the tokenizer.json of Mistral's first models writes it."""
    pieces = mistral.load(small.DATA / "small")[1].vocabulary()[:END]
    ids = {text: id for id, (text, _, _) in enumerate(pieces)}
    merges = generate_merges(ids, {text: score for text, score, kind in pieces if kind == 1})
    model = tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    control = [
        tokenizers.AddedToken(text, special=True, normalized=False)
        for text in ("<|im_start|>", "</s>")
    ]
    end = tokenizers.AddedToken("<|im_end|>", special=True, normalized=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=end,
        additional_special_tokens=control,
    )


def load_pair(folder, their_tokenizer, **options):
    """(ours, the harness's own) of one checkpoint."""
    options = {"device": "cpu", "dtype": "float32", "batch_size": 3} | options
    theirs = HFLM(str(folder), tokenizer=their_tokenizer, softmax_dtype="float32", **options)
    return MistralLM(str(folder), **options), theirs


@pytest.fixture(scope="module")
def pair(folder, their_tokenizer):
    return load_pair(folder, their_tokenizer)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The local tasks, found from the root of the project, without the harness's thousands."""
    monkeypatch.chdir(small.ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture
def evaluate(tasks, monkeypatch):
    """Results of one task, and each document's answers."""
    # It asks pip for all that is installed, in a process.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)

    def run(model, task, **options):
        results = lm_eval.simple_evaluate(
            model, tasks=[task], task_manager=tasks, log_samples=True, bootstrap_iters=0, **options
        )
        return results["results"][task], [sample["resps"] for sample in results["samples"][task]]

    return run


def requests(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def texts_of_the_tasks():
    rows = [
        json.loads(line)
        for path in sorted(TASKS.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [
        value for row in rows for key in ("question", "text", "prompt") if (value := row.get(key))
    ]


class Counting(mistral.Mistral):
    """Counts what the model is asked."""

    calls = 0

    def forward(self, tokens, *args, **kwargs):
        self.calls += 1
        return super().forward(tokens, *args, **kwargs)


@pytest.fixture
def counted(folder):
    ours = MistralLM(str(folder), device="cpu", batch_size=3)
    ours.model.__class__ = Counting
    return ours


def test_both_tokenizers_give_the_same_ids(pair):
    # Without this the comparisons below would say nothing.
    ours, theirs = pair
    assert len(texts := texts_of_the_tasks()) == 14
    for text in [
        *texts,
        "",
        "  two spaces ",
        "<s>one beginning",
        "<|im_start|>user\nhi<|im_end|>\n",
        "ends </s>",
    ]:
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(
            text, add_special_tokens=False
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shots", [0, 2])  # with two, the questions are longer than the model reads
def test_a_multiple_choice_task_has_the_scores_of_hf_to_the_last_bit(
    folder, their_tokenizer, evaluate, dtype, shots
):
    ours, theirs = load_pair(folder, their_tokenizer, dtype=dtype)
    results, answers = evaluate(ours, "local_choices", num_fewshot=shots)
    assert (results, answers) == evaluate(theirs, "local_choices", num_fewshot=shots)
    assert 0 < results["acc,none"] < 1
    assert len({log_p for document in answers for ((log_p, _),) in document}) > 15


def test_a_perplexity_task_has_the_scores_of_hf(pair, evaluate):
    ours, theirs = pair
    results, answers = evaluate(ours, "local_texts")
    expected, their_answers = evaluate(theirs, "local_texts")
    for key in ("word_perplexity,none", "byte_perplexity,none"):
        assert results[key] == pytest.approx(expected[key], rel=1e-6)
    assert answers == [[pytest.approx(each, rel=1e-6)] for (each,) in their_answers]
    assert max(len(ours.tok_encode(text)) for text in texts_of_the_tasks()) > 2 * ours.max_length


def test_a_writing_task_has_the_texts_of_hf(pair, evaluate):
    ours, theirs = pair
    results, answers = evaluate(ours, "local_writing")
    assert (results, answers) == evaluate(theirs, "local_writing")
    assert len({text for ((text,),) in answers}) == 5


def test_greedy_flags_and_truncation_are_those_of_hf(pair):
    ours, theirs = pair
    scored = []
    for length, new in ((3, 1), (3, 4), (20, 9), (63, 1), (64, 1), (65, 2), (90, 30), (5, 64)):
        context = small.tokens(length, seed=length, vocab_size=END).tolist()
        window = context[-64 + new :] if new < 64 else context[-1:]
        greedy = list(
            mistral.generate(ours.model, window, mistral.Sampling(temperature=0), max_new_tokens=1)
        )
        for continuation in (greedy * new, small.tokens(new, seed=7, vocab_size=END).tolist()):
            scored.append((None, context, continuation))
    # shares its input
    scored += [(None, context, continuation[:-1] + [9]) for _, context, continuation in scored]
    expected = theirs._loglikelihood_tokens(scored, disable_tqdm=True)
    assert ours._loglikelihood_tokens(scored, disable_tqdm=True) == expected
    assert {flag for _, flag in expected} == {True, False}


def test_answers_that_differ_in_their_last_token_share_a_forward(counted):
    (one, one_is_greedy), (other, _) = counted._loglikelihood_tokens(
        [(None, [1, 20], [30, 40]), (None, [1, 20], [30, 41])]
    )
    assert counted.model.calls == 1
    log_p = counted.model(torch.tensor([[1, 20, 30]]))[0].log_softmax(dim=-1)
    assert one == pytest.approx((log_p[1, 30] + log_p[2, 40]).item())
    assert other == pytest.approx((log_p[1, 30] + log_p[2, 41]).item())
    assert not one_is_greedy


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_no_answer(folder, pair, batch_size):
    ours = pair[0]
    other = MistralLM(str(folder), device="cpu", batch_size=batch_size)
    scores = requests("loglikelihood", *((text, " it rained") for text in texts_of_the_tasks()))
    for (log_p, flag), (their_log_p, their_flag) in zip(
        ours.loglikelihood(scores), other.loglikelihood(scores)
    ):
        assert log_p == pytest.approx(their_log_p, abs=1e-4)
        assert flag == their_flag
    prompts = requests(
        "generate_until", *((text, {"max_gen_toks": 9}) for text in texts_of_the_tasks())
    )
    assert ours.generate_until(prompts) == other.generate_until(prompts)


def test_stop_strings_end_a_text_where_hf_ends_it(pair):
    ours, theirs = pair
    prompts = texts_of_the_tasks()[:6]
    free = ours.generate_until(
        requests("generate_until", *((p, {"until": [], "max_gen_toks": 16}) for p in prompts))
    )
    middles = [text[len(text) // 2 :][:3] for text in free]
    asked = requests(
        "generate_until",
        *(
            (p, {"until": [m, "<|im_start|>"], "max_gen_toks": 16})
            for p, m in zip(prompts, middles)
        ),
    )
    texts = ours.generate_until(asked)
    assert texts == theirs.generate_until(asked)
    assert texts == [text[: text.index(middle)] for text, middle in zip(free, middles)]


def test_a_batch_stops_when_its_last_text_has_ended(counted):
    (free,) = counted.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 40})))
    assert counted.model.calls == 40
    counted.model.calls = 0
    asked = requests("generate_until", *[("the cat", {"until": free[:1], "max_gen_toks": 40})] * 2)
    assert counted.generate_until(asked) == ["", ""]
    assert counted.model.calls == 1


def test_the_end_of_text_token_ends_a_text(folder, their_tokenizer):
    ours, theirs = load_pair(folder, their_tokenizer)
    with torch.no_grad():
        x, milk = (
            ours.model.model(torch.tensor([ours.tok_encode(text)]), None, None)[0, -1]
            for text in ("x", "milk")
        )
    for model in (ours.model, theirs.model):
        model.lm_head.weight.data[END] = 3 * (x - milk)  # now a text most probably ends behind "x"
    asked = requests("generate_until", *((text, {"max_gen_toks": 8}) for text in ("x", "milk")))
    texts = ours.generate_until(asked)
    assert texts == theirs.generate_until(asked)
    assert texts[0] == ""
    assert texts[1] != ""


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "max_new_tokens": 7},
        {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.3},
        {"num_beams": 1, "max_tokens": 5},
    ],
    ids=str,
)
def test_generation_options_mean_what_they_mean_to_hf(pair, options):
    ours, theirs = pair
    asked = requests(
        "generate_until",
        *((text, {"max_gen_toks": 12} | options) for text in texts_of_the_tasks()[:5]),
    )
    if "max_tokens" in options or "max_new_tokens" in options:
        for request in asked:
            del request.args[1]["max_gen_toks"]
    written = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        written.append(model.generate_until(asked))
    assert written[0] == written[1]
    assert len(set(written[0])) == 5


def test_requests_with_other_options_are_not_mixed_into_a_batch(pair):
    ours, _ = pair
    asked = requests("generate_until", *(("the cat", {"max_gen_toks": n}) for n in (2, 12, 2)))
    short, long, same = ours.generate_until(asked)
    assert short == same
    assert long.startswith(short)
    assert len(long) > len(short)


def test_answers_are_kept_for_the_next_run(counted, tmp_path):
    asked = requests("loglikelihood", ("the cat", " sat"), ("", "a dog"))
    texts = requests("generate_until", ("the cat", {"max_gen_toks": 3}))
    whole = requests("loglikelihood_rolling", ("the cat sat",))
    runs = []
    for _ in range(2):
        cached = CachingLM(counted, str(tmp_path / "answers.db"))
        runs.append(
            [
                cached.loglikelihood(asked),
                cached.generate_until(texts),
                cached.loglikelihood_rolling(whole),
            ]
        )
        calls = counted.model.calls
        counted.model.calls = 0
    assert runs[0] == runs[1]
    assert calls == 0


def test_a_conversation_is_read_as_the_chat_driver_reads_it(pair):
    ours, _ = pair
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    ids = encode_chat(ours.tokenizer, messages)
    assert ours.tok_encode(ours.apply_chat_template(messages)) == ids
    begun = ours.apply_chat_template([*messages, {"role": "assistant", "content": "the"}], False)
    assert ours.tok_encode(begun) == ids + ours.tokenizer.encode(
        "the", bos=False, prefix_space=False
    )


def test_a_task_can_be_asked_as_a_conversation(pair, evaluate):
    ours, _ = pair
    _, plain = evaluate(ours, "local_choices")
    _, answers = evaluate(ours, "local_choices", apply_chat_template=True)
    assert answers != plain


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"batch_size": "auto"}, "batch_size must be a number of rows, not 'auto'"),
        ({"batch_size": 0}, "batch_size must be a number of rows, not 0"),
        ({"max_length": 65}, "max_length must be between 1 and 64, not 65"),
        ({"max_length": 0}, "max_length must be between 1 and 64, not 0"),
        ({"pretrained": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_arguments_that_make_no_sense_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        MistralLM(**{"pretrained": str(folder), "device": "cpu"} | arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 4}, "beam search is not supported"),
        ({"penalty_alpha": 0.6}, "'penalty_alpha'; supported: .*min_p"),
        ({"max_gen_toks": 64}, "max_gen_toks must be between 0 and max_length - 1 = 63, not 64"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_generation_options_that_make_no_sense_are_named(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate_until(requests("generate_until", ("x", {"max_gen_toks": 4} | options)))


def test_an_answer_without_tokens_is_named(pair):
    with pytest.raises(ValueError, match="cannot score 0 tokens after .*the cat"):
        pair[0].loglikelihood(requests("loglikelihood", ("the cat", "")))


def test_logits_that_are_no_numbers_are_no_score(counted):
    counted.model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="the logits are NaN"):
        counted.loglikelihood(requests("loglikelihood", ("the cat", " sat")))
    with pytest.raises(ValueError, match="the logits are NaN"):
        counted.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 4})))


def test_the_harness_knows_the_model_by_name():
    assert get_model("mistral_from_scratch") is MistralLM
    project = tomllib.loads((small.ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {
        "mistral_from_scratch": f"{MistralLM.__module__}:{MistralLM.__name__}"
    }


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    common = [
        "harness",
        "--model",
        "mistral_from_scratch",
        "--include_path",
        str(TASKS),
        "--tasks",
        "local_choices",
    ]
    monkeypatch.setattr(sys, "argv", [*common, *arguments])
    harness.main()


def test_the_command_line_evaluates_a_checkpoint(folder, tasks, monkeypatch, capsys):
    run_command(
        monkeypatch, "--model_args", f"pretrained={folder},dtype=float32", "--batch_size", "3"
    )
    assert "|local_choices|" in capsys.readouterr().out


def test_the_command_line_ends_in_one_line_where_there_is_no_checkpoint(tasks, monkeypatch):
    with pytest.raises(SystemExit, match="^error: /nowhere does not exist"):
        run_command(monkeypatch, "--model_args", "pretrained=/nowhere")


# --- The harness asks our server, by its own `local-completions`


@pytest.fixture(scope="module")
def over_http(folder, their_tokenizer):
    """`asked(length)`: the harness's client of a server that reads `length` tokens."""
    for name in ("aiohttp", "tenacity"):  # lm_eval[api]
        pytest.importorskip(name)
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    their_tokenizer.save_pretrained(folder / "tokenizer")
    serving = Serving(path=folder, engine="eager", packed=False, slots=3, room=64, threads=1)
    with served("ours", serving) as address:

        def asked(length):
            return LocalCompletionsAPI(
                base_url=f"{address}/v1/completions",
                model="small",
                tokenizer=str(folder / "tokenizer"),
                tokenizer_backend="huggingface",
                add_bos_token=True,
                max_length=length + 1,
                num_concurrent=1,
            )

        yield asked


def numbers(answers):
    """All scores in lists of lists; a flag is a number, too."""
    if not isinstance(answers, (list, tuple)):
        return [float(answers)]
    return [number for inner in answers for number in numbers(inner)]


@pytest.mark.slow
def test_the_server_gives_the_harness_the_adapters_scores(folder, over_http, evaluate):
    ours = MistralLM(str(folder), device="cpu", dtype="float32", sliding_window=None, max_length=62)
    # Their maximum counts the token that is scored and not read.
    for task in ("local_choices", "local_texts"):
        results, answers = evaluate(ours, task)
        found, got = evaluate(over_http(63), task)
        print(task, results, found)
        assert numbers(got) == pytest.approx(numbers(answers), abs=1e-4)
        for name, value in results.items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, rel=1e-5)
    results, answers = evaluate(ours, "local_writing")
    found, got = evaluate(over_http(62), "local_writing")
    print("local_writing", results, found)
    assert found == results
    # A completion continues its prompt, so the space before its first word is part of it. The
    # adapter decodes an answer alone, as hf does, and that drops the space.
    assert [[[text.removeprefix(" ")]] for ((text,),) in got] == answers
