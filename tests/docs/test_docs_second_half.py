"""What the book's later chapters say about their figures, and the names in its reference pages."""

import ast
import importlib
import inspect
import re

import pytest
import small
import test_docs
import transformers

import mistral
from mistral.checkpoints.names import consolidated_names, gguf_names
from mistral.quantization.dequantize import _scales_and_mins


def data(name):
    return test_docs.style.saved_data(name)


# -- figures: what the prose beside them says of any demo --


def test_the_bits_of_the_scales_are_those_of_the_drawing_in_the_code():
    drawn = re.findall(r"\b[A-Ha-h]{8}\b", inspect.getdoc(_scales_and_mins))
    assert data("q4_k_block")["scales"] == drawn
    nibbles = data("q4_k_block")["nibbles"]
    assert sorted(weight for pair in nibbles for weight in pair) == list(range(256))
    assert all(high == low + 32 for low, high in nibbles)


def test_a_vector_of_a_tile_has_eight_columns_of_eight_rows_and_pairs_of_neighbours():
    lanes = data("packed_lanes")["lanes"]
    places = [tuple(place) for lane in lanes for place in lane]
    assert sorted(places) == [(row, column) for row in range(8) for column in range(8)]
    for left, right in zip(lanes[::2], lanes[1::2]):
        assert [(row, column + 1) for row, column in left] == [tuple(place) for place in right]


def test_temperature_removes_nothing_and_every_other_warper_removes_tokens():
    figure = data("warpers")
    assert 0.02 < max(figure["plain"]) < 0.8, (
        "a distribution that leaves the warpers something to do"
    )
    for name, probabilities in figure["warped"].items():
        assert (min(probabilities) > 0) == name.startswith("temperature"), name
    sharp = figure["warped"]["temperature 0.5"]
    flat = figure["warped"]["temperature 1.5"]
    assert sharp[0] > figure["plain"][0] > flat[0]


def test_the_grammar_leaves_little_choice_at_a_key_and_hundreds_in_a_string():
    figure = data("grammar_mask")
    allowed = dict(zip(figure["tokens"], figure["allowed"]))
    # the brace: alone, with white space, or with the quote of the first key
    assert figure["allowed"][0] <= 3
    assert figure["allowed"][-1] == 1
    assert figure["tokens"][0].startswith("{") and figure["tokens"][-1] == "<|im_end|>"
    assert max(allowed.values()) > 200
    assert sum(count < 10 for count in figure["allowed"]) >= 7
    assert sum(count == 1 for count in figure["allowed"]) >= 2
    assert all(count < figure["vocabulary"] for count in figure["allowed"])


def test_the_end_tag_that_a_user_writes_is_text():
    tokens = data("chat_turns")["tokens"]
    controls = [text for text, _, control in tokens if control]
    assert controls == ["<s>", *["<|im_start|>", "<|im_end|>"] * 2, "<|im_start|>"]
    assert "<|im_end|>" in "".join(text for text, _, control in tokens if not control)


def test_a_tolerance_fits_between_rounding_and_mistakes_in_float32_and_not_in_bfloat16():
    errors = data("sizes_of_errors")
    *exact, bfloat16 = errors["rounding"].values()
    assert max(exact) < 2e-5
    assert 0.1 < bfloat16 < 1 < min(errors["mistakes"].values())


def test_the_bytes_of_a_7b_are_those_of_its_config():
    from decode_bytes import FINER, SEVEN_B, matrix_bytes

    # not the embedding, ...
    read = SEVEN_B.num_parameters - SEVEN_B.vocab_size * SEVEN_B.hidden_size
    read -= (2 * SEVEN_B.num_hidden_layers + 1) * SEVEN_B.hidden_size  # ... and not the norms
    assert sum(matrix_bytes("BF16").values()) == 2 * read
    assert sum(matrix_bytes("Q8_0").values()) == read * 34 / 32
    assert sum(matrix_bytes("Q4_0").values()) < sum(matrix_bytes("Q4_K_M").values()) < read
    assert len(FINER) == 16
    points = data("roofline")["points"]
    assert (
        points[0]["tokens"] == 1
        and points[0]["intensity"] < data("roofline")["ridge"] < points[-1]["intensity"]
    )


# -- tests that pages name --

TESTS = {
    str(path.relative_to(small.ROOT)): {
        n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)
    }
    for path, text in test_docs.TEXT.items()
    if path.is_relative_to(small.ROOT / "tests")
}


@pytest.mark.parametrize("name", test_docs.PAGES)
def test_every_test_that_a_page_names_exists(name):
    for span in test_docs.spans(test_docs.PAGES[name]):
        if "::" in span:
            path, _, test = span.partition("::")
            assert test in TESTS.get(path, ()), f"{name}: {span}"


def test_a_test_that_is_gone_is_noticed():
    assert "test_the_example_in_the_docstring" in TESTS["tests/test_cache.py"]
    assert "test_the_example" not in TESTS["tests/test_cache.py"]


# -- names side by side --

COMING_FROM = test_docs.PAGES["reference/coming-from.md"]


def tables(page):
    """{heading: rows}, each row a dict by the table's column names."""
    found = {}
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        lines = [
            line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")
        ]
        cells = [[cell.strip() for cell in line] for line in lines]
        if cells:
            found[section.splitlines()[0]] = [dict(zip(cells[0], row)) for row in cells[2:]]
    return found


TABLES = tables(COMING_FROM)


def named(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_every_name_in_the_column_here_exists():
    checked = 0
    for rows in TABLES.values():
        for row in rows:
            for name in named(row.get("here", "")):
                exists = (
                    (small.ROOT / name).exists() if "/" in name else test_docs.name_exists(name, "")
                )
                assert exists, name
                checked += 1
    assert checked > 40


def test_sizes_have_the_names_of_transformers_unless_the_table_says_otherwise():
    theirs = vars(transformers.MistralConfig())
    for row in TABLES["Sizes"][1:]:
        (name,) = named(row["here"])
        assert name in mistral.Config.__dataclass_fields__
        assert (row["transformers"] == "the same") == (name in theirs), name
    assert "rope_theta" in theirs["rope_parameters"]


def test_names_of_transformers_exist():
    modules = [
        transformers,
        importlib.import_module("transformers.models.mistral.modeling_mistral"),
    ]
    modules += [importlib.import_module("transformers.utils"), transformers.GenerationConfig()]
    modules += [
        importlib.import_module("transformers.integrations.sdpa_attention"),
        transformers.DynamicCache,
    ]
    modules += [transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]
    for rows in TABLES.values():
        for name in [name for row in rows for name in named(row.get("transformers", ""))]:
            if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in (
                "Linear4bit",
                "rope_parameters",
            ):
                assert any(hasattr(module, name) for module in modules), name


def test_the_tensors_names_are_those_of_the_table_that_files_are_read_by():
    rows = TABLES["Tensors"]
    ours = [named(row["here and transformers"])[0] for row in rows]
    assert set(ours) == set(gguf_names(1))
    for name, row in zip(ours, rows):
        assert named(row["GGUF"]) == [gguf_names(1)[name]]
        assert named(row["Mistral's own"]) == [consolidated_names(1)[name]]
