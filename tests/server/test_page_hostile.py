"""The chat page among hostile models, tools and files, in two tabs, and when things break."""

import json

import pytest
from page_server import ABOUT, TOOLS, Said
from page_window import needs_chromium

pytestmark = needs_chromium


RUN = "window.top.pwned=1"
OTHER = "http://elsewhere.test"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"<SCRIPT SRC={OTHER}/x.js></SCRIPT>",
    f"<img src=x onerror={RUN}>",
    f"<svg onload={RUN}><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror={RUN}&gt;'>",
    f"<form action={OTHER}><input name=attributes><button formaction=javascript:{RUN}>x</button></form>",
    f"<iframe srcdoc='<script>{RUN}</script>'></iframe><object data={OTHER}></object><embed src={OTHER}>",
    f"<meta http-equiv=refresh content='0;url={OTHER}'><base href={OTHER}><link rel=stylesheet href={OTHER}>",
    f"<style>@import '{OTHER}';body{{display:none}}</style><p style='position:fixed;inset:0'>over all</p>",
    "<a id=send name=send>x</a><img name=body id=messages><form id=composer><input id=composer-text>",
    f"[a](javascript:{RUN}) [b](JaVaScRiPt&colon;{RUN}) [c](\x01javascript:{RUN}) [d](java\nscript:{RUN})",
    f"[e](data:text/html,<script>{RUN}</script>) [f](vbscript:x) [g](blob:x) [h](file:///etc/passwd) [i](tel:1) [j](ftp://x)",
    f"<javascript:{RUN}> <data:text/html,x>",
    f"![picture]({OTHER}/beacon.png) ![x](data:image/svg+xml,<svg/onload={RUN}>)",
    f'![" onerror="{RUN}]({OTHER}/"onerror="{RUN}) [x]({OTHER}/ "t\\" onmouseover=\\"{RUN}")',
    f'[ref]\n\n[ref]: javascript:{RUN} "<img src=x onerror={RUN}>"',
    f'```"><img src=x onerror={RUN}>\n</code></pre><script>{RUN}</script>\n```',
    f"````html\n```\n<script>{RUN}</script>\n```\n````\n```python\n</span><img src=x onerror={RUN}>\n",
    f"`</code><img src=x onerror={RUN}>` **<b onclick={RUN}>**",
    f"| a<script>{RUN}</script> | b |\n|--|--|\n| <img src=x onerror={RUN}> | <svg/onload={RUN}> |",
    f"- [x] <input type=checkbox onfocus={RUN} autofocus>\n1. <details open ontoggle={RUN}>",
    f"# <h1 onmouseover={RUN}>\n> <video><source onerror={RUN}></video>",
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f"<textarea></textarea><img src=x onerror={RUN}><xmp><plaintext>",
    f"<?xml-stylesheet href='{OTHER}'?><!DOCTYPE x [<!ENTITY e '{RUN}'>]><![CDATA[<img src=x onerror={RUN}>]]>",
    f"&lt;img src=x onerror={RUN}&gt; &#60;script&#62;{RUN}&#60;/script&#62;",
    "\u202egnp.exe\u202c \u2066\u200f\x00\x1b[31m \ufeff\ud7ff\U000e0041",
    "__proto__ constructor {{7*7}} ${7*7} <%= 1 %>",
]
WHAT_IS_THERE = """
(() => {
  const places = document.querySelectorAll('#messages, #sidebar, #banner, #run, #model, #popover, dialog');
  const all = [...places].flatMap(place => [...place.querySelectorAll('*')]);
  const known = new Set(`a article aside b blockquote br button code del details div em figcaption figure h1 h2 h3 h4 h5 h6
    hr i input kbd li mark ol option p path pre section select span strong summary svg table tbody td textarea th thead tr ul label`.split(/\\s+/));
  const wrong = [];
  for (const e of all) {
    if (!known.has(e.localName)) wrong.push(e.localName);
    for (const {name, value} of e.attributes) {
      if (name.startsWith('on') || name === 'srcdoc' || name === 'src' || name === 'name') wrong.push(name);
      if (name === 'style' && !/^(--[a-z]+: [\\d.]+; ?)*$/.test(value)) wrong.push(value);
      if (name === 'href' && !/^(https?|mailto):/.test(value)) wrong.push(value);
    }
    if (e.localName === 'a' && (e.rel !== 'noopener noreferrer nofollow' || e.target !== '_blank')) wrong.push(e.outerHTML);
    if (e.id && e.closest('.prose, .call, .bubble')) wrong.push('id ' + e.id);
  }
  return [wrong, window.pwned, document.querySelectorAll('meta[http-equiv], base, iframe, object, embed').length];
})()
"""


def assert_clean(page):
    wrong, ran, foreign = page.js(WHAT_IS_THERE)
    assert wrong == [] and ran is None and foreign == 0
    assert page.js("document.getElementById('send').localName") == "button"
    assert page.js("location.href").startswith(page.server.url)


def test_a_hostile_answer_is_text(page):
    page.server.answers = ["\n\n".join(HOSTILE)]
    page.ask("Hi")
    assert_clean(page)
    shown = page.text(".prose")
    for part in (f"<script>{RUN}</script>", f"<img src=x onerror={RUN}>", "image: picture"):
        assert part in shown


@pytest.mark.slow
def test_each_hostile_text_alone_is_text(page):
    """Nothing before it changes what it means."""
    page.server.answers = ["Hello", *HOSTILE]
    page.ask("Hi")
    for text in HOSTILE:
        before = len(page.server.bodies)
        page.click("article.answer button", "Another answer")
        page.idle(before)
        assert page.js("document.querySelector('.prose').textContent.length") > 0, text
        assert_clean(page)


def test_every_prefix_of_a_hostile_answer_is_text(page):
    """While it is streamed, tags and fences are open."""
    text = "".join(HOSTILE[4:7]) + "\n```x\n" + HOSTILE[17] + HOSTILE[19]
    page.js(
        "import('/page/markdown.js').then(({ show }) => { const text = "
        + json.dumps(text)
        + "; const place = document.createElement('div'); place.className = 'prose'; "
        "document.getElementById('messages').append(place); "
        "for (let n = 0; n <= text.length; n += 3) show(place, text.slice(0, n)); })"
    )
    assert_clean(page)


def test_hostile_tools_questions_titles_errors_and_names(page):
    evil = "".join(HOSTILE[:10]) + HOSTILE[-2]
    tool = {**TOOLS[0], "name": evil[:200], "description": evil, "source": evil}
    page.server.about |= {"name": evil, "tools": [tool], "format": evil, "quantization": evil}
    page.open()
    page.server.answers = [
        Said(evil, calls=[(evil[:200], json.dumps({evil: evil}))]),
        Said(evil, error=evil),
        Said(evil),
    ]
    page.server.results[evil[:200]] = {"result": evil}
    page.click("#run-toggle")
    page.server.run = {
        "slots": [{"id": evil, "state": evil, "held_tokens": 1, "capacity": 9}],
        "waiting": 0,
    }
    page.ask(evil, wait=False)
    page.wait("document.querySelector('.call.asking')")
    assert_clean(page)
    page.click(".choices button", "Run once")
    page.idle(1)
    page.wait("document.querySelector('.notice.failed') && document.querySelector('.slot')")
    page.js("document.querySelector('.token.generated').focus()")
    assert evil.replace("\n", " ")[:60] in page.text(".call").replace("\n", " ")
    assert_clean(page)
    for opener in ("#tools", "#search"):
        page.click(opener)
        page.wait("document.querySelector('dialog[open]')")
        assert_clean(page)
        page.close_dialog()
    lines = (
        json.dumps({"format": evil}) + "\n" + json.dumps({"role": "user", "content": evil}) + "\n"
    )
    lines += json.dumps(
        {
            "role": "assistant",
            "content": evil,
            "tool_calls": [{"id": evil, "function": {"name": evil, "arguments": evil}}],
        }
    )
    page.js(
        f"import('/page/transfer.js').then(m => {{ window.read = m.conversationOf({json.dumps(lines)}, 'x') }})"
    )
    page.wait("window.read.nodes.length === 2")
    assert_clean(page)


def test_signs_that_turn_the_text_are_shown_in_code(page):
    code = "access = 'user\u202e\u2066# admin\u2069'"
    page.js("navigator.clipboard.writeText = async text => { window.copied = text }")
    page.server.answers = [f"```python\n{code}\n```"]
    page.ask("Hi")
    page.wait("document.querySelector('.code .hljs-string')")
    assert page.texts(".code mark") == ["U+202E", "U+2066", "U+2069"]
    page.click(".code figcaption button")
    page.wait(f"window.copied === {json.dumps(code)}")  # what is copied is what was written


SLOW = {
    "emphasis": "_a__b" * 25_000,
    "strike": "~a~~" * 10_000,
    "links": "[a](" * 10_000,
    "quotes": ">" * 30_000,
    "lists": "\n".join("  " * i + "- a" for i in range(300)),
    "table": "|a" * 20_000 + "\n" + "|-" * 20_000,
    "fences": "```\n" * 10_000,
    "line": "w" * 1_000_000,
}


def assert_fast(page, text):
    """Without limits it takes minutes."""
    spent = page.js(
        "import('/page/markdown.js').then(({ show }) => { const place = document.createElement('div'); "
        f"const text = {json.dumps(text)}; const start = performance.now(); show(place, text); "
        "window.shown = place; return performance.now() - start; })"
    )
    assert spent < 10_000
    assert page.js("window.shown.textContent.length") > 0


def test_a_text_made_to_be_slow_is_not(page):
    for name in ("emphasis", "quotes", "line"):
        assert_fast(page, SLOW[name])


@pytest.mark.slow
def test_no_text_made_to_be_slow_is(page):
    for text in SLOW.values():
        assert_fast(page, text)


@pytest.mark.slow
def test_a_line_of_ten_megabytes(page):
    line = "x" * 10_000_000
    page.server.answers = [Said([line]), "Done"]
    page.ask("Hi")
    page.click(".prose button")
    page.wait("document.querySelector('.prose').textContent.length === 10_000_000")
    page.ask("And?")
    assert len(page.server.bodies[1]["messages"][1]["content"]) == 10_000_000


# Accidents


def test_two_tabs_continue_one_conversation_and_neither_loses_anything(page):
    page.ask("Root")
    place = page.js("location.hash")
    with page.browser.other_tab():
        page.open(place)
        page.server.answers = [Said(["From ", "two"], hold=1)]
        page.ask("Second tab", wait=False)
        page.wait("document.querySelectorAll('.prose')[1].innerText.trim() === 'From'")
        with page.browser.first_tab():
            # This tab sees what the other one writes, and that it is not interrupted.
            nodes = (
                "Promise.all([import('/page/state.js'), import('/page/messages.js')]).then(([s, m]) => "
                "{ m.noteInterrupted(); window.seen = [...s.state.nodes.values()] })"
            )
            page.wait(f"({nodes}, window.seen?.some(node => node.message.content === 'From '))")
            assert [node["status"] for node in page.js("window.seen")][-1] == "writing"
            page.server.answers = ["From one"]
            page.ask("First tab")
            assert page.texts(".bubble") == ["Root", "First tab"]
        page.server.release.set()
        page.idle()
        assert page.texts(".bubble") == ["Root", "Second tab"]
        assert page.texts(".prose")[1] == "From two"
        page.wait(
            "[...document.querySelectorAll('.branches')].some(e => e.innerText.includes('2'))"
        )
    page.open(place)
    assert "/ 2" in page.text("article.question .branches")
    other = {"First tab": "Second tab", "Second tab": "First tab"}[page.texts(".bubble")[1]]
    page.click("article.question .branches button:not(:disabled)")
    page.wait(f"document.querySelectorAll('.bubble')[1].innerText === '{other}'")
    assert page.texts(".prose")[1] == {"First tab": "From one", "Second tab": "From two"}[other]


def test_settings_of_two_tabs(page):
    with page.browser.other_tab():
        page.open()
        page.js("import('/page/state.js').then(m => m.change({ allowed: { tool: 'never' } }))")
        page.wait("localStorage.getItem('mistral.settings').includes('never')")
    page.js(
        "import('/page/state.js').then(async m => { while (!m.state.settings.allowed.tool) "
        "await new Promise(next => setTimeout(next, 10)); m.change({ json: true }) })"
    )
    kept = page.js("JSON.parse(localStorage.getItem('mistral.settings'))")
    assert kept["allowed"] == {"tool": "never"} and kept["json"] is True


def test_a_conversation_deleted_in_another_tab(page):
    page.ask("Root")
    place = page.js("location.hash")
    with page.browser.other_tab():
        page.open(place)
        page.click("#conversations button", "Delete Root")
        page.click("dialog button", "Delete")
        page.wait("document.body.classList.contains('blank')")
    page.wait("document.body.classList.contains('blank')")
    page.ask("New")
    assert page.texts("#conversations .title") == ["New"]


def test_a_reload_in_mid_answer_keeps_what_was_written(page):
    page.server.answers = [Said(["One ", "two ", "three"], hold=2), "Again"]
    page.ask("Count", wait=False)
    page.wait("document.querySelector('.prose').innerText.trim() === 'One two'")
    page.js(
        "import('/page/store.js').then(async store => { for (;;) { "
        "const nodes = await store.nodesOf(location.hash.slice(1)); "
        "if (nodes.some(node => node.message.content === 'One two ')) return; "
        "await new Promise(next => setTimeout(next, 20)); } })"
    )
    page.browser.call("Page.reload")
    page.wait("document.body.dataset.ready === 'yes' && document.querySelector('.notice')")
    assert page.text(".prose") == "One two"
    assert "Interrupted" in page.text(".notice")
    page.click(".notice button", "Retry")
    page.idle(1)
    assert page.text(".prose") == "Again" and page.text("article.answer .branches") == "2 / 2"


def test_a_reload_in_the_middle_of_a_call(page):
    page.server.answers = [Said("I look.", calls=[("stock_price", "{}")] * 2), "Fine"]
    page.ask("Call", wait=False)
    page.wait("document.querySelector('.call.asking')")
    page.browser.call("Page.reload")
    page.wait("document.body.dataset.ready === 'yes' && document.querySelector('.notice')")
    assert page.texts(".call .state") == ["interrupted", "did not run"]
    page.click(".notice button", "Answer")
    page.idle(1)
    results = page.server.bodies[1]["messages"][2:]
    assert len(results) == 2 and all("interrupted" in result["content"] for result in results)
    page.ask("Go on")
    roles = [message["role"] for message in page.server.bodies[2]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert page.server.called == []


def test_a_server_that_ends_in_mid_answer_and_is_started_anew(page):
    page.server.answers = [Said(["One ", "two ", "three"], hold=2)]
    page.ask("Count", wait=False)
    page.wait("document.querySelector('.prose').innerText.trim() === 'One two'")
    page.server.stop()
    page.wait("document.querySelector('.notice.failed')")
    assert "ended in the middle" in page.text(".notice") and page.text(".prose") == "One two"
    page.wait("!document.querySelector('#banner').hidden")
    page.ask("Still there?", wait=False)
    page.wait("document.querySelectorAll('.notice.failed').length === 2")
    page.server.about = ABOUT | {"name": "the new server"}
    page.server.start()
    page.wait("document.querySelector('#banner').hidden")
    page.wait("document.querySelector('#model strong').innerText === 'the new server'")
    page.server.answers = ["One two three"]
    page.click("article:last-of-type .notice button", "Retry")
    page.idle(1)
    assert page.text(".prose") == "One two three"
    assert page.server.bodies[-1]["messages"][1]["content"] == "One two "
    assert all("Failed to load" in text or "ERR_" in text for text in page.browser.complaints)
    page.browser.complaints.clear()


def test_an_answer_that_does_not_end_well_says_so(page):
    for said, message in (
        (Said("Half an", error="row 0: the logits are NaN"), "row 0: the logits are NaN"),
        (Said("Half an", breaks=True), "The connection ended in the middle of the answer."),
        (Said("Half an", finish="length"), "The answer was cut off at its limit of tokens."),
    ):
        before = len(page.server.bodies)
        page.server.answers = [said, "Better"]
        page.ask("Hi")
        page.wait("document.querySelector('.notice')")
        assert message in page.text(".notice") and page.text(".prose") == "Half an"
        page.click(".notice button", "Retry")
        page.idle(before + 1)
        page.wait("!document.querySelector('.notice')")
        assert page.text(".prose") == "Better"
    page.browser.complaints[:] = [text for text in page.browser.complaints if "ERR_" not in text]


def test_a_request_that_is_refused_says_why(page):
    page.server.refused = (400, "temperature must be 0 or at least 1e-5")
    page.ask("Hi", wait=False)
    page.wait("document.querySelector('.notice.failed')")
    assert "temperature must be 0" in page.text(".notice")
    (complaint,) = page.browser.complaints
    assert "400" in complaint
    page.browser.complaints.clear()


def test_a_page_without_storage_works_and_says_so(page):
    refuse = (
        "for (const name of ['indexedDB', 'localStorage', 'sessionStorage']) Object.defineProperty("
        "window, name, { get() { throw new Error('refused') } });"
    )
    script = page.browser.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)
    page.open()
    page.browser.call("Page.removeScriptToEvaluateOnNewDocument", **script)
    assert "does not keep conversations" in page.text("#banner")
    page.ask("Hi")
    assert page.text(".prose") == "Hello!"
    assert page.texts("#conversations .title") == ["Hi"]


def test_a_full_storage_does_not_end_the_conversation(page):
    page.js("IDBObjectStore.prototype.put = function () { this.transaction.abort() }")
    page.ask("Hi")
    assert page.text(".prose") == "Hello!" and "not kept: the browser stored nothing" in page.text(
        "#banner"
    )
    page.ask("Again")
    assert [message["role"] for message in page.server.bodies[1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
