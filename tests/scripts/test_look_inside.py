"""Looking inside: the recorder sees what the model does, and the page shows it."""

import base64
import json
import re
import runpy
import sys
import zlib

import browser
import numpy as np
import pytest
import small
import torch

import mistral
from mistral import inside, tracing
from mistral.inside import page as writer
from mistral.rotary import rotate
from mistral.tracing import Recorder, Stopwatch, logit_lens

LAYERS, HEADS, WINDOW = (
    small.SIZES[name] for name in ("num_hidden_layers", "num_attention_heads", "sliding_window")
)
PROMPT = small.tokens(11).tolist()
NEW = 6


def record(model, prompt=PROMPT, new=NEW):
    return inside.record(model, prompt, new, ())


def explicit_attention(model, ids):
    """Weights [layers, N, T, T] of a whole text, head by head, in the words of the paper."""
    found = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args: found.append(args[:2]))
        for layer in model.model.layers
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    T = len(ids)
    H = model.config.head_dim
    G = HEADS // model.config.num_key_value_heads
    weights = torch.zeros(LAYERS, HEADS, T, T, dtype=torch.float64)
    for i, (x, rotary) in enumerate(found):
        attention = model.model.layers[i].self_attn
        q = rotate(attention.q_proj(x).view(1, T, -1, H).transpose(1, 2), *rotary)[0]
        k = rotate(attention.k_proj(x).view(1, T, -1, H).transpose(1, 2), *rotary)[0]
        for n in range(HEADS):
            for t in range(T):
                first = max(0, t - WINDOW + 1)
                scores = k[n // G, first : t + 1] @ q[n, t] / H**0.5
                weights[i, n, t, first : t + 1] = scores.softmax(dim=0)
    return weights


def hooks_of(model):
    return [
        h
        for module in model.modules()
        for h in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


@pytest.mark.parametrize("watcher", [Recorder, Stopwatch])
def test_watching_changes_no_bit_and_leaves_nothing_behind(watcher):
    model = small.model(torch.float32)
    tokens = small.tokens(1, 11)

    def logits():
        cache = model.new_cache(1)
        return [model(tokens, cache), *(model(tokens[:, i : i + 1], cache) for i in range(5))]

    alone = logits()
    with watcher(model):
        assert hooks_of(model)
        watched = logits()
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert not hooks_of(model)


@pytest.mark.parametrize("watcher", [Recorder, Stopwatch])
def test_hooks_are_removed_after_an_exception(watcher):
    model = small.model()
    with pytest.raises(IndexError), watcher(model):
        model(torch.tensor([[3, 999]]))
    assert not hooks_of(model)


def test_a_forward_that_breaks_off_is_not_recorded():
    model = small.model()
    with Recorder(model) as trace:
        with pytest.raises(IndexError):
            model(torch.tensor([[3, 999]]))
        model(torch.tensor([[3, 4]]))
    assert trace.tokens == [3, 4]
    assert trace.residual().shape == (LAYERS + 1, 2, small.SIZES["hidden_size"])


def test_recorded_attention_is_explicit_attention_far_past_the_window():
    model = small.model()
    trace, _ = record(model)
    expected = explicit_attention(model, trace.tokens)
    for layer in range(LAYERS):
        weights = trace.attention(layer)
        torch.testing.assert_close(weights.double(), expected[layer], atol=5e-4, rtol=0)
        torch.testing.assert_close(
            weights.double().sum(dim=-1), torch.ones(HEADS, 17).double(), atol=2e-3, rtol=0
        )
        assert not weights[expected[layer] == 0].any()


def test_recorded_keys_are_those_in_the_cache():
    model = small.model()
    ids = small.tokens(1, 11)
    cache = model.new_cache(1)
    with Recorder(model) as trace:
        for part in ids.split(3, dim=1):
            model(part, cache)
    for layer in range(LAYERS):
        keys = torch.cat([step.keys[layer] for step in trace.steps], dim=2)
        kept = cache.slot_positions[0]
        assert sorted(kept.tolist()) == [7, 8, 9, 10]
        torch.testing.assert_close(cache.keys[layer][:, :, : cache.num_slots], keys[:, :, kept])


def test_hidden_states_lead_from_the_embedding_to_the_logits():
    model = small.model()
    ids = small.tokens(1, 11)
    with Recorder(model) as trace:
        logits = model(ids)
    residual = trace.residual()
    assert torch.equal(residual[0], model.model.embed_tokens(ids[0]))
    torch.testing.assert_close(model.lm_head(model.model.norm(residual[-1])), logits[0])
    added = [step.attention_norm for step in trace.steps][0]
    x = residual[1]
    attention = model.model.layers[1].self_attn(
        model.model.layers[1].input_layernorm(x[None]),
        model.model.rotary(torch.arange(11)[None], x.dtype),
        mistral.cache.chunk_mask(torch.arange(11)[None], WINDOW),
        None,
    )
    torch.testing.assert_close(added[1], attention[0].float().norm(dim=-1))
    mlp = residual[2] - x - attention[0]
    torch.testing.assert_close(trace.added_norms()[1][1], mlp.float().norm(dim=-1))


def test_each_step_tells_its_slots_and_evicts_just_what_left_the_window():
    trace, watch = record(small.model())
    assert [(step.start, step.end) for step in trace.steps] == [
        (0, 4),
        (4, 8),
        (8, 11),
        *((t, t + 1) for t in range(11, 17)),
    ]
    assert len(watch.steps) == len(trace.steps)
    for step in trace.steps:
        assert [write.position for write in sorted(step.writes, key=lambda w: w.position)] == [
            *range(step.start, step.end)
        ]
        for slot, position, evicted in step.writes:
            assert slot == position % WINDOW
            assert evicted == (position - WINDOW if position >= WINDOW else -1)
        assert sorted(step.slots) == [*range(max(0, step.end - WINDOW), step.end)]


def test_positions_that_a_chunk_itself_replaces_are_never_written():
    model = small.model()
    with Recorder(model) as trace:
        model(small.tokens(1, 11), model.new_cache(1))
    assert sorted(write.position for write in trace.steps[0].writes) == [7, 8, 9, 10]


def test_a_recorder_follows_one_text_alone():
    model = small.model()
    with Recorder(model):
        with pytest.raises(ValueError, match="one row without padding, not 3 rows"):
            model(small.tokens(3, 5))
        with pytest.raises(ValueError, match="one row without padding"):
            model(small.tokens(1, 5), model.new_cache(1), [3])
        model(small.tokens(1, 5))
        with pytest.raises(
            ValueError, match="it has read 5 tokens, and this forward pass begins at position 0"
        ):
            model(small.tokens(1, 5))


def test_a_text_too_long_to_record_is_refused_before_it_is_read(monkeypatch):
    model = small.model()
    monkeypatch.setattr(tracing, "_ATTENTION_LIMIT", 2 * LAYERS * HEADS * 8**2)
    with (
        Recorder(model) as trace,
        pytest.raises(ValueError, match="at most 8 tokens of this model"),
    ):
        model(small.tokens(1, 9))
    assert not trace.steps
    with Recorder(model) as trace:
        model(small.tokens(1, 8))
    assert trace.tokens


def test_a_7b_can_be_recorded_for_512_tokens():
    assert (
        tracing.most_tokens(
            small.config(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
        )
        == 512
    )


def test_the_lens_ends_in_what_the_model_predicts():
    model = small.model()
    trace, _ = record(model)
    lens = logit_lens(model, trace, top=5)
    p = model(torch.tensor([trace.tokens]))[0].float().softmax(dim=-1)  # [T, V]
    torch.testing.assert_close(lens.probabilities[-1], p.topk(5).values)
    assert torch.equal(lens.ids[-1], p.topk(5).indices)
    came = torch.tensor(trace.tokens[1:])
    torch.testing.assert_close(lens.following[-1, :-1], p[:-1].gather(1, came[:, None])[:, 0])
    assert (lens.following[:, -1] == 0).all()
    early = model.lm_head(model.model.norm(model.model.embed_tokens(torch.tensor(trace.tokens))))
    assert torch.equal(lens.ids[0, :, 0], early.argmax(dim=-1))
    # greedy: the most probable one came
    assert trace.tokens[11:] == lens.ids[-1, 10:-1, 0].tolist()


def test_the_lens_of_a_long_text_is_put_together_in_order():
    model = small.model(sliding_window=None)
    with Recorder(model) as trace:
        logits = model(small.tokens(1, 300))[0]  # 4 x 300 rows: three portions
    assert torch.equal(logit_lens(model, trace, top=1).ids[-1, :, 0], logits.argmax(dim=-1))


def test_the_stopwatch_times_every_module_and_the_parts_make_the_whole():
    model = small.model()
    _, watch = record(model)
    for seconds in watch.steps:
        assert set(seconds) == {
            name for name, _ in model.named_modules() if not name.endswith("layers")
        }
        assert all(s > 0 for s in seconds.values())
        assert (
            sum(s for name, s in seconds.items() if name.count(".") == 2 and "layers" in name)
            < seconds["model"]
        )
        assert seconds["model"] + seconds["lm_head"] < seconds[""]
        parts = writer.milliseconds(seconds)
        assert len(parts) == len(writer.PARTS)
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(1000 * seconds[""], abs=0.01)


# ---- the page ----


def unpack(packed, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype)


def tokenizer_of(texts=()):
    """Mistral's own pieces, and control tokens of these texts behind them."""
    return small.true_tokenizer(added={32000 + i: text for i, text in enumerate(texts)})


def make_page(model, tokenizer, prompt=PROMPT, new=NEW, name="a model", **options):
    trace, watch = record(model, prompt, new)
    data = writer.page_data(model, tokenizer, trace, watch, prompt=len(prompt), top=5, name=name)
    return writer.render(data, trace, **options), trace


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_page_holds_what_the_model_does(dtype):
    model = small.model(dtype)
    page, trace = make_page(model, tokenizer_of())
    data = data_of(page)
    T = 17
    assert (data["prompt"], data["tokens"], data["slots"], data["least"]) == (
        11,
        trace.tokens,
        WINDOW,
        1,
    )
    rows, columns = np.tril_indices(T)
    for layer, packed in enumerate(data["attention"]):
        weights = np.zeros((HEADS, T, T))
        weights[:, rows, columns] = unpack(packed, np.uint8).reshape(HEADS, -1) / 255
        assert np.abs(weights - trace.attention(layer).numpy()).max() < 0.51 / 255
        assert np.abs(weights.sum(axis=-1) - 1).max() < WINDOW * 0.51 / 255 + 0.02
    lens = logit_lens(model, trace, 5)
    assert unpack(data["lens_ids"], "<u4").tolist() == lens.ids.flatten().tolist()
    probabilities = unpack(data["lens_probabilities"], "<u2") / 65535
    assert np.abs(probabilities - lens.probabilities.flatten().numpy()).max() < 1e-5
    norms = unpack(data["norms"], "<f4").reshape(3 * LAYERS + 1, T)
    np.testing.assert_allclose(
        norms[: LAYERS + 1], trace.residual().double().norm(dim=-1), rtol=1e-3
    )
    for step, recorded in zip(data["steps"], trace.steps, strict=True):
        assert (step["start"], step["end"]) == (recorded.start, recorded.end)
        assert [tuple(write) for write in step["writes"]] == recorded.writes
    assert {str(id) for id in trace.tokens} <= set(data["texts"])


def test_the_page_opens_on_the_head_that_is_least_trivial():
    T = 6
    first = torch.zeros(T, T)
    first[:, 0] = 1
    itself = torch.eye(T)
    uniform = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    before = torch.eye(T).roll(-1, dims=1).tril()
    half = torch.zeros(T, T)
    half[torch.arange(T), torch.arange(T) // 2] = 1  # of the way back: 0 0 1 1 2 2
    heads = torch.stack((first, itself, uniform, before, half)).to(torch.float16)
    *trivial, told = writer._distances(heads, None).tolist()
    assert trivial == pytest.approx([0, 0, 0, 0], abs=1e-3)
    # Rows 1 to 5 look 1, 1, 2, 2, 3 back: the means at these distances are 2/5, 2/4 and 1/3.
    all_seen = 2 / 5 + 2 / 4 + 1 / 3
    by_row = [0, 1 - 2 / 5 / (2 / 5 + 2 / 4), 1 - 2 / 4 / all_seen, 1 - 2 / 4 / all_seen]
    by_row.append(1 - 1 / 3 / all_seen)
    assert told == pytest.approx(sum(by_row) / 5, abs=1e-3)
    assert writer._distances(torch.ones(2, 1, 1), None).tolist() == [0, 0]
    _, trace = make_page(small.model(), tokenizer_of())
    scores = torch.stack([writer._distances(trace.attention(i), WINDOW) for i in range(LAYERS)])
    opens = writer.telling_head(trace)
    assert scores[opens["layer"], opens["head"]] == scores.max()


def test_a_narrow_window_is_what_a_uniform_head_sees():
    in_sight = torch.ones(9, 9).tril().triu(diagonal=-2)
    uniform = in_sight / in_sight.sum(dim=-1, keepdim=True)
    assert writer._distances(uniform[None], 3).tolist() == pytest.approx([0], abs=1e-6)


def test_small_weights_are_left_out_until_the_page_fits():
    model = small.model(sliding_window=None)
    prompt = small.tokens(60).tolist()
    whole, _ = make_page(model, tokenizer_of(), prompt)
    limit = len(whole) - sum(map(len, data_of(whole)["attention"])) // 5
    page, trace = make_page(model, tokenizer_of(), prompt, most_bytes=limit)
    data = data_of(page)
    assert len(page.encode()) <= limit
    assert data["least"] > 1
    shown = unpack(data["attention"][0], np.uint8)
    full = writer.eight_bits(trace.attention(0).numpy()).flatten()
    assert np.array_equal(shown, np.where(full < data["least"], 0, full))
    with pytest.raises(ValueError, match="shorten the text"):
        make_page(model, tokenizer_of(), most_bytes=1000)


def test_512_tokens_of_the_demo_stay_below_5_mb():
    model, tokenizer = mistral.load("demo", device="cpu", dtype=torch.float32)
    prompt = tokenizer.encode((small.ROOT / "README.md").read_text())[:510]
    page, trace = make_page(model, tokenizer, prompt, new=2)
    assert len(trace.tokens) == 512
    assert len(page.encode()) < 5_000_000


HOSTILE = [
    "</script><img/src=x/onerror=alert(1)>",
    "<!--",
    "<script>",
    "\u202eabc\x07",
    "{{data}}",
    "&amp;",
]


def hostile_page():
    tokenizer = tokenizer_of(HOSTILE)
    prompt = [1, *range(32000, 32000 + len(HOSTILE)), 5]
    model = small.model(vocab_size=32008)
    return make_page(model, tokenizer, prompt, new=1, name="<b>&</title>{{script}}")[0]


def test_hostile_tokens_cannot_leave_their_place():
    page = hostile_page()
    assert len(re.findall(r"</script", page, re.I)) == 2
    assert len(re.findall(r"<script", page, re.I)) == 2
    assert "<!--" not in page
    assert "<title>Inside &lt;b&gt;&amp;&lt;/title&gt;{{script}}</title>" in page
    data = data_of(page)
    assert [data["texts"][str(32000 + i)] for i in (0, 1, 4)] == [
        HOSTILE[0],
        HOSTILE[1],
        HOSTILE[4],
    ]
    assert data["texts"]["32003"] == r"\u202eabc\u0007"


def test_tokens_are_made_visible():
    tokenizer = tokenizer_of(["<|im_end|>"])
    newline = 13
    lone_byte = 3 + 0xE2
    unknown = 40000
    shown = [writer.token_text(tokenizer, id) for id in (1, newline, lone_byte, 32000, unknown)]
    assert shown == ["<s>", "↵", r"\xe2", "<|im_end|>", "[40000]"]
    [hello] = tokenizer.encode("the", bos=False)
    assert writer.token_text(tokenizer, hello) == "\u2581the"


def test_the_page_runs_its_own_script_alone():
    page, _ = make_page(small.model(), tokenizer_of())
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    script = re.findall(r"<script>(.*?)</script>", page, re.S)
    style = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert policy.startswith("default-src 'none'")
    assert writer.digest(script[0]) in policy
    assert writer.digest(style[0]) in policy
    assert not re.search(
        r"innerHTML|insertAdjacentHTML|document\.write|fetch\(|https?://(?!www\.w3\.org)", script[0]
    )


def test_the_files_that_the_page_names_exist():
    template = (writer.TEMPLATES / "page.html").read_text()
    names = re.findall(r"(?:mistral|scripts)/\w+\.py", template)
    assert len(names) > 6
    assert all((small.ROOT / name).is_file() for name in names)


@pytest.mark.gpu
def test_a_model_on_a_gpu_can_be_looked_into():
    page, trace = make_page(small.model(torch.bfloat16).cuda(), tokenizer_of())
    data = data_of(page)
    assert data["model"]["where"] == "bfloat16 on cuda:0"
    assert all(time > 0 for step in data["steps"] for time in step["times"])
    assert trace.steps[0].keys[0].is_cuda
    assert not trace.residual().is_cuda


# ---- the script ----


@pytest.fixture
def run_script(monkeypatch, capsys):
    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", ["scripts/look_inside.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(small.ROOT / "scripts/look_inside.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    monkeypatch.setattr("warnings.showwarning", None)  # which `run` replaces
    return run_script


def test_the_script_writes_a_page_and_replaces_only_pages(run_script, tmp_path):
    out = tmp_path / "page.html"
    command = (
        "demo",
        "What is a cache?",
        "--chat",
        "--window",
        8,
        "--new-tokens",
        3,
        "-o",
        out,
        "--device",
        "cpu",
    )
    code, said = run_script(*command)
    assert (code, "This is the demo" in said) == (0, True)
    assert re.search(r"wrote .*page\.html, .* kB: \d+ tokens and [0-3] new ones", said)
    data = data_of(out.read_text())
    assert data["model"]["window"] == data["slots"] == 8
    assert any(evicted >= 0 for step in data["steps"] for _, _, evicted in step["writes"])
    assert run_script(*command)[0] == 0
    out.write_text("my own work")
    code, said = run_script(*command)
    assert code == 1
    assert "exists and is not a page of this script; remove it or name another file" in said
    assert out.read_text() == "my own work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", ""], "the text is empty"),
        (["demo", "a", "--top", 0], "--top 1 to 20"),
        (["demo", "a", "--new-tokens", -1], "--new-tokens must be 0 or more"),
        (["demo", "a", "-o", "no/such/folder/page.html"], "is not a folder"),
        (
            ["demo", "a", "--new-tokens", 511],
            "a page holds 512 of this model: shorten the text or lower --new-tokens",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(
    run_script, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, said = run_script(*arguments)
    assert code == 1
    assert message in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_packed_checkpoint_can_be_looked_into(run_script, tmp_path):
    out = tmp_path / "page.html"
    code, said = run_script(
        "demo", "Hello", "--packed", "--new-tokens", 2, "-o", out, "--device", "cpu"
    )
    assert code == 0, said
    assert len(data_of(out.read_text())["steps"]) == 3


# ---- in a browser ----

needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="needs Chromium (Debian's package: chromium)"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page, wide or narrow; at the end, no complaint and no request may have occurred."""
    chromium.complaints.clear()
    chromium.requests.clear()

    def opened(page, width=1280, dark=False):
        (tmp_path / "page.html").write_text(page)
        chromium.show(width, 900, dark)
        chromium.open(tmp_path / "page.html")
        chromium.wait("document.body.dataset.shown !== undefined")
        return chromium

    yield opened
    assert chromium.complaints == []
    assert {url.rpartition("/")[2] for url in chromium.requests} == {"page.html"}


def shown(page, expression):
    return page.evaluate(f"document.querySelector({json.dumps(expression)}).innerText")


@needs_chromium
def test_a_click_on_a_token_moves_every_panel(opened):
    model = small.model()
    html, trace = make_page(model, tokenizer_of())
    data = data_of(html)
    page = opened(html)
    layer, head = data["opens"].values()
    assert "always the most probable one" in shown(page, "#tokens")
    # the end of the prompt
    assert page.evaluate("document.body.dataset.shown") == f"10 {layer} {head}"
    assert f"opens on layer {layer}, head {head}:" in shown(page, "#opens")
    page.click("#strip [data-position='13']")
    page.wait(f"document.body.dataset.shown === '13 {layer} {head}'")
    lens = logit_lens(model, trace, 5)
    first = data["texts"][str(lens.ids[-1, 13, 0].item())]
    assert shown(page, "#candidates .label") == first
    assert shown(page, "#candidates .value") == f"{100 * lens.probabilities[-1, 13, 0]:.1f}%"
    assert "position 13 of 0 to 16" in shown(page, "#here")
    assert (
        page.evaluate("document.querySelector('#strip [aria-pressed=true]').dataset.position")
        == "13"
    )
    assert shown(page, "#grid thead .chosen").startswith("13 ")
    assert shown(page, "#grid tbody tr:last-child td.chosen") == first
    strongest = trace.attention(layer)[head, 13].argmax().item()
    assert shown(page, "#seen .label").startswith(f"{strongest} ")
    assert (
        "Step 6 of 9 read position 13. Position 13 went to slot 1, where position 9 was."
        in shown(page, "#told")
    )
    assert [
        text.split(":")[0]
        for text in page.evaluate(
            "[...document.querySelectorAll('#slots .number')].map((n) => n.innerText)"
        )
    ] == ["0", "1", "2", "3"]
    assert (
        page.evaluate("document.querySelector('#chart svg').getAttribute('aria-label')")
        == "norms of position 13"
    )
    assert shown(page, "#took").startswith("Step 6, position 13: ")


@needs_chromium
def test_a_head_at_a_glance_opens_and_a_slot_shows_its_sum(opened):
    html, _ = make_page(small.model(), tokenizer_of())
    page = opened(html)
    for layer, head in ((2, 4), (0, 1)):
        page.click("#heads", across=(head + 0.5) / HEADS, down=(layer + 0.5) / LAYERS)
        page.wait(f"document.body.dataset.shown === '10 {layer} {head}'")
    assert f"slot p mod {WINDOW}" in shown(page, "#cache p")
    assert "as many as the window is long" in shown(page, "#why")
    assert shown(page, "#example").endswith(f": 10 = 2 × {WINDOW} + 2, so slot 2.")
    page.click("#ring", across=0.01, down=8.5 / 9)
    page.wait("document.body.dataset.shown.startsWith('16 ')")
    assert shown(page, "#example").endswith(f": 16 = 4 × {WINDOW} + 0, so slot 0.")
    over = "document.querySelectorAll('#slots div')[1].onpointerenter()"
    page.evaluate(over)
    assert shown(page, "#example").endswith(f": 13 = 3 × {WINDOW} + 1, so slot 1.")


@needs_chromium
def test_keys_heat_map_bars_and_menus_work(opened):
    html, trace = make_page(small.model(), tokenizer_of())
    page = opened(html)
    page.click("#heads", across=0.01, down=0.01)
    for key, position in (("ArrowRight", 11), ("ArrowRight", 12), ("ArrowLeft", 11)):
        page.press(key)
        page.wait(f"document.body.dataset.shown === '{position} 0 0'")
    page.click("#heat", across=0.1, down=5.5 / 17)
    page.wait("document.body.dataset.shown === '5 0 0'")
    page.click("#back")
    page.wait("document.body.dataset.shown === '4 0 0'")
    page.click("#ring", across=0.01, down=8.5 / 9)
    page.wait("document.body.dataset.shown === '16 0 0'")
    page.click("#steps rect:nth-of-type(3)", down=0.9)
    page.wait("document.body.dataset.shown === '10 0 0'")
    page.evaluate(
        "(() => { const e = document.querySelector('#layer'); e.value = 2; e.onchange(); })()"
    )
    page.evaluate(
        "(() => { const e = document.querySelector('#head'); e.value = 4; e.onchange(); })()"
    )
    page.wait("document.body.dataset.shown === '10 2 4'")
    best = trace.attention(2)[4, 10].max().item()
    assert abs(float(shown(page, "#seen .value").rstrip("%")) - 100 * best) < 0.3
    assert shown(page, "#shared") == "reads key/value head 1"
    page.evaluate(
        "(() => { const e = document.querySelector('#shade'); e.value = 'attention'; e.onchange(); "
        "})()"
    )
    page.wait("document.querySelector('#strip button').title.includes('attention: ')")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_tokens_are_text_in_the_browser_and_nothing_overflows(opened, width):
    page = opened(hostile_page(), width, dark=width == 390)
    assert page.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert shown(page, "#strip [data-position='1']") == HOSTILE[0]
    assert shown(page, "#name") == "<b>&</title>{{script}}"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    beyond = (
        "[...document.querySelectorAll('section > *')].filter((e) => "
        "e.getBoundingClientRect().right > innerWidth)"
    )
    assert page.evaluate(f"{beyond}.length") == 0


@needs_chromium
def test_without_a_window_or_a_continuation_the_panels_still_say_what_is_so(opened):
    html, _ = make_page(small.model(sliding_window=None), tokenizer_of(), prompt=[1, 9], new=0)
    page = opened(html)
    assert page.evaluate("document.body.dataset.shown").startswith("1 ")
    assert "no window" in shown(page, "#facts")
    assert "nothing is ever evicted" in shown(page, "#told")
    assert "The text ends here." in shown(page, "#candidates")
    assert page.evaluate("document.querySelector('#forth').disabled")
