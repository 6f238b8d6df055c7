import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from pydantic import ValidationError

from softshard.config import Job
from softshard.evaluate.metrics import METRICS, HumanMetrics, ModelMetrics
from softshard.evaluate.plots import PlotData
from softshard.evaluate.report import (
    BaselineChoice,
    Example,
    HoldoutSummary,
    NllDifference,
    Report,
    TargetsSummary,
    TrainingStep,
)
from softshard.evaluate.scoring import ReliabilityBin
from softshard.evaluate.write import write_report
from softshard.storage import LocalStore

EVIL = "<script>alert('x')</script> & <img src=http://example.com/a.png onerror=y> $x^2$ {{ 7 * 7 }}"
JOB = {
    "name": "demo",
    "out": "runs/demo",
    "corpus": {
        "sources": [{"name": "s", "uri": f"texts/{EVIL}", "style": "t", "license": "MIT", "rights_basis": "licensed"}]
    },
    "teacher": {"model": "m"},
}


def metrics(nll, **changes):
    values = dict.fromkeys(ModelMetrics.model_fields, 0.5)
    return ModelMetrics(**(values | {"human_nll_nats": nll} | changes))


def report(**changes):
    steps = tuple(
        TrainingStep(step=n, loss=4 - n / 40, retention_loss=n / 100, learning_rate=1e-4) for n in range(1, 61)
    )
    values = {
        "job": "demo",
        "manifest": "ab" * 32,
        "settings": Job.model_validate(JOB).model_dump(mode="json"),
        "holdout": HoldoutSummary(
            documents=7, sequences=9, labels=1234, num_bytes=5678, prompts=3, teacher_nll_nats=3.25
        ),
        "human": HumanMetrics(
            mattr=0.8, distinct_2=0.9, distinct_3=0.95, mean_sentence_words=11.5, mean_sample_tokens=90
        ),
        "base": metrics(3.9981, mattr=0.6),
        "ce": metrics(3.5582, mattr=0.81),
        "adapter": metrics(3.6004, mattr=0.78),
        "adapter_minus_base": NllDifference(difference_nats=-0.3977, standard_error_nats=0.02),
        "adapter_minus_ce": NllDifference(difference_nats=0.0422, standard_error_nats=None),
        "baseline_choice": tuple(
            BaselineChoice(learning_rate=rate, human_nll_nats=nll) for rate, nll in ((1e-4, 3.6), (2e-4, 3.5582))
        ),
        "corpus": ({"source": EVIL, "documents": 70, "tokens": 12345},),
        "targets": TargetsSummary(
            parts=4,
            positions=11000,
            bytes_per_position=31.25,
            mean_entries=12.5,
            mean_squared_error=0.0126,
            gradient_angle_degrees=8.5,
            mean_kl_nats=None,
        ),
        "training": {"ce": steps, "adapter": steps, "<script>$1$</script>": steps[:5]},
        "examples": tuple(
            Example(prompt=f"{n} {EVIL}", human=EVIL, base=EVIL, ce=EVIL, adapter=EVIL) for n in range(6)
        ),
    }
    return Report(**(values | changes))


def plot_data(names=("base", "ce", "adapter")):
    bins = tuple(
        ReliabilityBin(lower=n / 5, upper=(n + 1) / 5, num_labels=40 - 9 * n, confidence=n / 5 + 0.1, accuracy=n / 5)
        for n in range(5)
    )
    return PlotData(
        sentence_lengths={name: (3, 5, 5, 9 + len(name)) for name in ("human", *names)},
        rank_frequency=dict.fromkeys(("human", *names), (0.5, 0.3, 0.1, 0.1)),
        reliability=dict.fromkeys(names, bins),
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.styles, self._cell = [], [], [], None
        self.cells = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "td":
            self._cell = [dict(attributes), ""]

    def handle_endtag(self, tag):
        if tag == "td":
            self.cells.append(self._cell)
            self._cell = None

    def handle_data(self, data):
        (self.styles if self.tags and self.tags[-1][0] == "style" else self.text).append(data)
        if self._cell is not None:
            self._cell[1] += data


def written(tmp_path, made=None, data=None):
    write_report(made or report(), plot_data=data or plot_data(), store=LocalStore(tmp_path))
    return (tmp_path / "index.html").read_text(), json.loads((tmp_path / "metrics.json").read_text())


def marked(html, name):
    """Values of a row of the comparison, and those of them that are marked best."""
    row = re.search(rf'<th scope="row">{re.escape(name)}<.*?</tr>', html, re.DOTALL)[0]
    cells = Page(row).cells
    return [text for _, text in cells], [text for attributes, text in cells if "best" in attributes["class"].split()]


def test_metrics_have_one_object_a_model_with_the_promised_keys(tmp_path):
    _, values = written(tmp_path)
    promised = {
        "human_nll_nats",
        "bits_per_byte",
        "ece",
        "mattr",
        "sentence_length_w1",
        "token_l2",
        "retention_nll_nats",
        "ms_per_token",
    }
    for name in ("base", "ce", "adapter"):
        assert promised <= values[name].keys()
    assert values["base"]["human_nll_nats"] == 3.9981
    assert values["settings"]["train"]["alpha"] == 0.75, "defaults are part of the settings"


def test_metrics_can_be_read_back(tmp_path):
    made = report()
    written(tmp_path, made)
    assert Report.model_validate_json((tmp_path / "metrics.json").read_bytes()) == made


def test_the_same_report_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_report(report(), plot_data=plot_data(), store=LocalStore(tmp_path / name))
    for file in ("index.html", "metrics.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_text_from_models_corpus_and_job_is_escaped(tmp_path):
    html, _ = written(tmp_path)
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "".join(page.text).count("<script>alert('x')</script>") > 6 * 5
    assert "{{ 7 * 7 }}" in html, "a template in a text is text"


def test_the_page_fetches_nothing(tmp_path):
    html, _ = written(tmp_path)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"link", "script", "iframe", "img", "image", "object", "embed", "base"}
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"href", "src", "xlink:href", "srcset", "action", "data"}
    ]
    assert addresses, "the figures refer to their own parts"
    assert all(address.startswith("#") for address in addresses)
    inline = [value for _, attributes in page.tags for value in attributes.values() if value and "url(" in value]
    assert all(re.search(r"url\((?!#)", value) is None for value in inline)
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)


def test_figures_refer_only_to_parts_that_the_page_has_once(tmp_path):
    html, _ = written(tmp_path)
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_has_four_named_figures_and_a_language(tmp_path):
    html, _ = written(tmp_path)
    page = Page(html)
    assert ("html", {"lang": "en"}) in page.tags
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    named = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(named) == 4
    assert all(attributes["aria-label"] for attributes in named)


def test_the_best_model_is_marked_by_the_rule_of_its_row(tmp_path):
    html, _ = written(tmp_path)
    assert marked(html, "Loss on human text, nats per token") == (["", "3.998", "3.558", "3.600"], ["3.558"])
    # nearest to the human .8, not the highest
    assert marked(html, "Variety of words (MATTR)") == (["0.800", "0.600", "0.810", "0.780"], ["0.810"])
    assert marked(html, "Milliseconds per token")[1] == []


def test_values_that_read_alike_are_marked_alike(tmp_path):
    made = report(ce=metrics(3.60041), adapter=metrics(3.60039))
    html, _ = written(tmp_path, made)
    assert marked(html, "Loss on human text, nats per token")[1] == ["3.600", "3.600"]


def test_the_first_sentence_says_the_difference_with_its_error(tmp_path):
    html, _ = written(tmp_path)
    text = " ".join("".join(Page(html).text).split())
    assert "On 1,234 held-out tokens of human writing the adapter’s loss is 3.600 nats per token" in text
    assert "0.398 ± 0.020 below the base model’s" in text
    assert "0.042 above that of ordinary cross-entropy fine-tuning" in text


def test_the_page_says_how_its_numbers_were_made(tmp_path):
    html, _ = written(tmp_path)
    text = " ".join("".join(Page(html).text).split())
    assert "7 documents, 1,234 predicted tokens, which are 5,678 bytes" in text
    assert "3 beginnings of 24 tokens, continued by at most 96 tokens at temperature 1," in text
    assert "the best on this same hold-out is shown, which favours it" in text
    assert "chunk_positions: 512" in text, "settings that were not given are printed with their defaults"


def test_a_job_without_a_baseline_has_no_column_for_it(tmp_path):
    examples = (Example(prompt="a", human="b", base="c", ce=None, adapter="d"),)
    made = report(ce=None, adapter_minus_ce=None, baseline_choice=(), examples=examples, training={})
    html, values = written(tmp_path, made, plot_data(("base", "adapter")))
    assert values["ce"] is None
    assert "cross-entropy" not in "".join(Page(html).text).lower()
    assert marked(html, "Loss on human text, nats per token") == (["", "3.998", "3.600"], ["3.600"])


def test_a_measure_that_no_model_has_is_left_out(tmp_path):
    unknown = metrics(3.5, kl_to_teacher_nats=None, retention_nll_nats=None)
    html, _ = written(tmp_path, report(base=unknown, ce=unknown, adapter=unknown))
    assert "Loss on other writing" not in html
    assert "Distance from the style teacher, nats" not in html
    assert "leaves out the tail of the distribution" in html


def test_a_page_can_be_made_of_models_that_wrote_nothing(tmp_path):
    nothing = PlotData(
        sentence_lengths=dict.fromkeys(("human", "base", "adapter"), ()),
        rank_frequency=dict.fromkeys(("human", "base", "adapter"), ()),
        reliability={"base": (), "adapter": ()},
    )
    examples = (Example(prompt="a", human="b", base="", ce=None, adapter=" "),)
    html, _ = written(tmp_path, report(examples=examples, ce=None, adapter_minus_ce=None, corpus=()), nothing)
    assert html.count("(ended at once)") == 2


def test_every_metric_is_a_field_of_the_report_in_the_same_order():
    assert [metric.key for metric in METRICS] == list(ModelMetrics.model_fields)
    assert [metric.key for metric in METRICS if metric.from_text] == list(HumanMetrics.model_fields)
    assert all((metric.from_text is None) != (metric.from_model is None) for metric in METRICS)
    assert all(metric.from_text for metric in METRICS if metric.better == "human")


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="finite"):
        metrics(float("nan"))


def test_the_record_is_read_without_torch():
    heavy = "{'torch', 'matplotlib', 'transformers'}"
    code = f"import sys, softshard.evaluate.report; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
