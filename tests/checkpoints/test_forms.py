"""The page about files says what `mistral.load` does with each form."""

import forms


def test_the_page_has_the_outcome_of_every_form():
    assert forms.page_with(forms.table()) == forms.PAGE.read_text()
