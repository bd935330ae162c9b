"""The web page: self-contained, escaped, and every token with its weight; and the report of the terminal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mora_jax.data import Conversation, EncodedDataset, Message, make_page
from mora_jax.data.inspect.views import describe_example, report_view, visible
from mora_jax.display.pages import write_page

VOID = {"meta", "rect", "line", "br"}


class Reader(HTMLParser):
    """Collects elements and checks that they are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.token_texts, self.runs = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID or (tag in ("rect", "line") and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)
        if dict(attributes).get("class") == "token":
            self.token_texts.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and self.elements[-1][1].get("class") == "token":
            self.token_texts[-1] += data


NASTY = [
    Conversation(
        (
            Message("user", "<script>alert('x')</script> & \"quoted\" </span></section>"),
            Message("assistant", "<b>bold</b>\n\x1b[31m\u202eevil 日本語 שלום"),
        ),
        source="<i>.json, row 1",
        weight=0.5,
    ),
    Conversation((Message("user", "a"), Message("assistant", "b", weight=0.0), Message("assistant", "c"))),
    Conversation(
        (Message("user", "<script>alert('x')</script> & \"quoted\" </span></section>"), Message("assistant", "c"))
    ),
]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("byte_level", "chatml")


@pytest.fixture
def dataset(tokenizer):
    return EncodedDataset.build(NASTY, tokenizer, mode="weighted", prompt_weight=0.25, max_length=256)


def test_every_token_is_there_with_id_weight_and_segment(dataset, tokenizer):
    reader = Reader(make_page(dataset, tokenizer, 3))
    tokens = [attributes for tag, attributes in reader.elements if attributes.get("class") == "token"]
    expected, texts = [], []
    for example in dataset:
        described = describe_example(example, tokenizer)
        for place, (token, (text, weight, segment)) in enumerate(
            zip(example.input_ids.tolist(), described, strict=True)
        ):
            expected.append(f"token {place}: id {token}, weight {weight:.3g}, {segment}")
            texts.append(visible(text))
    assert [attributes["title"] for attributes in tokens] == expected
    assert reader.token_texts == texts
    assert any("weight 0.125, user" in title for title in expected), "the row's weight counts"


def test_nothing_of_the_data_becomes_markup(dataset, tokenizer):
    page = make_page(dataset, tokenizer, 3)
    tags = {tag for tag, _ in Reader(page).elements}
    assert "script" not in tags and "b" in tags and "i" not in tags
    assert "alert(&#39;x&#39;)" in page
    assert "&lt;i&gt;.json" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)


def test_nothing_is_loaded(dataset, tokenizer):
    page = make_page(dataset, tokenizer, 1)
    attributes = [attributes for _, attributes in Reader(page).elements]
    assert not any({"src", "href", "srcset", "data"} & set(found) for found in attributes)
    assert "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_weights_are_told_by_more_than_colour(dataset, tokenizer):
    page = make_page(dataset, tokenizer, 2)
    assert "underline solid" in page and "underline dashed" in page
    for words in ("weight 1 or more", "weight between 0 and 1", "weight 0<"):
        assert words in page
    runs = [found["class"] for _, found in Reader(page).elements if str(found.get("class")).startswith("run ")]
    assert {"run part", "run off"} <= set(runs)


def test_report_and_advice_are_on_the_page(dataset, tokenizer):
    page = make_page(dataset, tokenizer, 0, recognised=False)
    for words in ("weighted, prompt_weight 0.25", "(as asked)", "Advice", "recommended max_length", "Most repeated"):
        assert words in page
    assert "<h2>Examples" not in page
    long = EncodedDataset.build([Conversation((Message("user", "a"), Message("assistant", "b " * 200)))] * 3, tokenizer)
    assert 'class="long"' not in make_page(long, tokenizer, 0)
    short = EncodedDataset(long.store, max_length=64)
    assert 'class="long"' in make_page(short, tokenizer, 0)


def test_bars_are_as_long_as_their_rows_are_many(tokenizer):
    rows = [Conversation((Message("user", "a"), Message("assistant", "b " * n))) for n in range(1, 120)]
    for limit in (64, 128, 100_000):
        report = EncodedDataset.build(rows, tokenizer, max_length=limit)
        page = make_page(report, tokenizer, 0)
        table = page[page.index("<h2>Row lengths") : page.index("<h2>Tokens")]
        reader = Reader(table)
        bars = [found for _, found in reader.elements if found.get("class") in ("count", "long")]
        shares = [float(re.fullmatch(r"width: (\S+)%", found["style"])[1]) for found in bars]
        starts, counts = report.report.histogram()
        assert shares == pytest.approx([100 * n / counts.max() for n in counts if n], abs=0.005)
        longest = [start >= limit for start, n in zip(starts, counts, strict=True) if n]
        assert [found["class"] == "long" for found in bars] == longest
        assert f"max_length {limit}" in table and f"recommended {report.report.recommended_max_length}" in table


def test_writing_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_page(path, "one")
    write_page(path, "two ü")
    assert path.read_text(encoding="utf-8") == "two ü"
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(UnicodeEncodeError):
        write_page(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "two ü"
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("width", [60, 80, 110])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_report_reads_without_colour(width, encoding, dataset, tokenizer):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding), width=width, force_terminal=False)
    console.print(report_view(dataset, tokenizer, console))
    console.file.flush()
    text = raw.getvalue().decode(encoding)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for expected in ("weighted, prompt_weight 0.25", "kept (examples)", "mean weight", "recommended", "limits"):
        assert expected in words
    bar = "█" if encoding == "utf-8" else "#"
    assert bar in text
    assert width < 60 or not any({*line.strip()} == {bar} for line in text.splitlines()), "a bar went on in a next line"


def test_no_rule_of_the_page_breaks_words_of_a_table_where_they_fit(dataset, tokenizer):
    page = make_page(dataset, tokenizer, 1)
    cells = re.search(r"\n(th:first-child, td:first-child \{.*?\})", page)[1]
    assert "overflow-wrap: break-word" in cells, "`anywhere` lets a column shrink to one letter"
