"""Untrusted text stays on one line, without terminal control sequences, Markdown or HTML."""

import pytest

from octav_hf._utils.escaping import escaped, markdown_code, markdown_text, shown


def test_shown_is_short_and_printable() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    values = [10**5000, -(10**5000), [10**5000], "\x1b[2J" * 10**6, list(range(10**6)), deep, {"a" * 10**6: 1}]
    for value in values:
        text = shown(value)
        assert len(text) < 2500
        assert text.isprintable()
    assert shown("é\n") == r"'é\n'"
    assert shown({"weight_bits": 8}) == "{'weight_bits': 8}"


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nb\r", "\u202e", "\x9b31m", "\ud800", "\u2028"], ids=ascii)
def test_escaped(text: str) -> None:
    for made in (escaped(text), markdown_code(text), markdown_text(text)):
        assert made.isprintable()
        made.encode()
    assert escaped("weight.é") == "weight.é"
    assert escaped("x" * 300) == "x" * 200 + "..."


def test_markdown() -> None:
    assert markdown_code("a`<b>`|c") == r"`a'<b>'\|c`"
    assert markdown_text("<b>[x](https://y) *z* | `q` www.y") == (r"\<b\>\[x\](https:\//y) \*z\* \| \`q\` www\.y")
    assert markdown_text("learning_rate") == "learning_rate"
