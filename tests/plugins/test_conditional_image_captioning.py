from __future__ import annotations

import pytest

from feature_extraction_server.tasks.conditional_image_captioning import without_prefix


@pytest.mark.parametrize(
    ("text", "caption", "expected"),
    [
        ("a photo of", "a photo of a cat", "a cat"),
        ("a photo of", "a cat", "a cat"),
        ("A Photo  of ", "a photo of a cat", "a cat"),
        ("Question: what is it? Answer:", "question : what is it? answer : a cat", "a cat"),
        ("Question: what is it? Answer:", "Question: what is it? Answer:a cat", "a cat"),
        ("", " a cat ", "a cat"),
        ("a photo of", "a photo of", ""),
        ("a photo of a cat", "a photo", "a photo"),
        ("a", "apples on a table", "apples on a table"),
        ("1", "12 apples", "12 apples"),
        ("it's", "it's, well, a cat", ", well, a cat"),
        ("这是", "这是一只猫", "一只猫"),
        ("นี่คือ", "นี่คือแมว", "แมว"),
    ],
    ids=[
        "echoed",
        "not echoed",
        "other case and spaces",
        "spaced punctuation",
        "no space",
        "empty text",
        "nothing but the text",
        "shorter than the text",
        "beginning of a word",
        "beginning of a number",
        "punctuation follows",
        "Chinese",
        "Thai",
    ],
)
def test_text_is_taken_away_from_a_caption_that_begins_with_it(text: str, caption: str, expected: str) -> None:
    assert without_prefix([caption, caption], {"text": text}) == [expected, expected]
