"""captions.py: the cleaner for captions from the web. (Captions files: test_sources.py, test_datasets.py.)"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pictures.captions import clean_web_caption

CASES = {
    "A cat on a <b>mat</b> &amp;amp; a dog": "A cat on a mat & a dog",
    "<PERSON> and <PERSON> at the beach": "person and person at the beach",
    "sunset http://www.example.com/a?b=1 over the sea": "sunset over the sea",
    "buy it at www.shop.de/x now": "buy it at now",
    "Garden chair - example.com": "Garden chair",
    "mail me@my-site.org for a print": "mail for a print",
    "a bridge, photo by @someone_1": "a bridge",
    "Cat P2000 drill": "Cat P2000 drill",
    "if a <b and c> d": "if a <b and c> d",
    "<a href='x'>Blue</a> vase<br/>": "Blue vase",
    "#sunset over #Paris #12345": "sunset over Paris",
    "IMG_20190312.jpg": "",
    "DSC_0042 a red barn": "a red barn",
    "kitchen_final.jpeg modern kitchen": "modern kitchen",
    "A tree, 1920x1080 px": "A tree",
    "Happy family, royalty free stock photo": "Happy family, royalty free",
    "Red apple - Stock Photo": "Red apple",
    "Stock photography of a lighthouse": "of a lighthouse",
    "wow!!!!! a fox....": "wow! a fox.",
    "an  owl ( ) in\ta tree ,  at night": "an owl in a tree, at night",
    "order 123456789 shoes": "order shoes",
    "12 monkeys in 1995": "12 monkeys in 1995",
    "a stock market chart, free download": "a stock market chart",
    "it's 5 < 6 and 7 > 3": "it's 5 < 6 and 7 > 3",
    "\u2022 The Alps \u2013": "The Alps",
    "price $25.00, 4.5 stars": "price $25.00, 4.5 stars",
    "日本の庭": "日本の庭",
}


@pytest.mark.parametrize("text", CASES)
def test_cleaner(text):
    assert clean_web_caption(text) == CASES[text]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="<>@#&;./-_!,ab1 ()wxhtp:", max_size=200))
def test_any_text_gives_one_tidy_line(text):
    cleaned = clean_web_caption(text)
    assert cleaned == " ".join(cleaned.split()) and not cleaned.endswith((",", ";", ":"))


@pytest.mark.parametrize("piece", ["a", "a-", "<", "<a", "@", "#1", "a@", "www.", "1x", "(", "&", "&amp;", "!", ".a"])
def test_a_hundred_thousand_characters(piece):
    assert len(clean_web_caption(piece * (100_000 // len(piece)))) <= 100_000
