"""Conversations in rows: their fields, roles and system prompts, and who answers."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from softshard.config import SourceSettings
from softshard.errors import SourceUnreadable
from softshard.sources.read import read_documents

PAIR = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]


def source(path, **changes):
    values = {"name": "s", "uri": str(path), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    return SourceSettings.model_validate({**values, "layout": "auto", **changes})


def read(path, **changes):
    return list(read_documents(source(path, **changes), max_document_bytes=2**20))


def read_row(tmp_path, row, **changes):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (document,) = read(path, **changes)
    return document


def shown(view):
    """A view as one string: s, u, a for the roles, A for an answer that is learned."""
    return [f"{'A' if turn.answer else turn.role[0]} {turn.text}" for turn in view]


def say(*pairs, keys=("role", "content")):
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


GOOD = {
    "messages": ({"messages": PAIR}, ["u So?", "A Yes."]),
    "share": ({"conversations": say(("human", "So?"), ("gpt", "Yes."), keys=("from", "value"))}, ["u So?", "A Yes."]),
    "share with roles": ({"conversations": PAIR, "id": 7}, ["u So?", "A Yes."]),
    "other names": ({"messages": say(("prompter", "So?"), ("Bot", "Yes."))}, ["u So?", "A Yes."]),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["u Add.\n1 2", "A 3"]),
    "alpaca without input": ({"instruction": "Add.", "input": "", "output": "3"}, ["u Add.", "A 3"]),
    "alpaca with history": (
        {"instruction": "More.", "output": "4", "history": [["Add.", "3"]]},
        ["u Add.", "A 3", "u More.", "A 4"],
    ),
    "prompt": ({"prompt": "So?", "completion": "Yes."}, ["u So?", "A Yes."]),
    "prompt of messages": (
        {"prompt": [*PAIR, {"role": "user", "content": "And?"}], "completion": say(("assistant", "No."))},
        ["u So?", "a Yes.", "u And?", "A No."],
    ),
    "system message": ({"messages": [*say(("system", "Be brief.")), *PAIR]}, ["s Be brief.", "u So?", "A Yes."]),
    "empty system message": ({"messages": [*say(("system", " ")), *PAIR]}, ["u So?", "A Yes."]),
    "system field": ({"messages": PAIR, "system": "Be brief."}, ["s Be brief.", "u So?", "A Yes."]),
    "parts": (
        {"messages": [say(("user", [{"type": "text", "text": "So"}, {"type": "text", "text": "?"}]))[0], PAIR[1]]},
        ["u So?", "A Yes."],
    ),
    "not to be learned": (
        {"messages": [PAIR[0], {**PAIR[1], "weight": 0}, PAIR[0], {**PAIR[1], "train": True}]},
        ["u So?", "a Yes.", "u So?", "A Yes."],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_rows_of_every_layout_are_conversations(tmp_path, name):
    row, expected = GOOD[name]
    (view,) = read_row(tmp_path, row).views
    assert shown(view) == expected


def test_the_text_of_a_conversation_is_its_turns_after_their_speakers(tmp_path):
    row = {"messages": PAIR, "who": "Ada", "system": "Be brief."}
    document = read_row(tmp_path, row, group_field="who")
    assert document.text == "system: Be brief.\n\nuser: So?\n\nassistant: Yes."
    other = read_row(tmp_path, {"messages": PAIR}, system="Of the source.")
    assert other.text == "user: So?\n\nassistant: Yes.", "what the source adds to all does not make it another"
    assert (document.name, document.group) == (f"file://{tmp_path / 'a.jsonl'}, line 1", "Ada")


TALK = say(("Ada", "Hi."), ("Bo", "Hello."), ("Ada", "Rain?"), ("Bo", "Rain."))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("second", [["u Hi.", "A Hello.", "u Rain?", "A Rain."]]),
        ("first", [["u Hello.", "A Rain?", "u Rain."]]),
        ("both", [["u Hello.", "A Rain?", "u Rain."], ["u Hi.", "A Hello.", "u Rain?", "A Rain."]]),
        ("Bo", [["u Hi.", "A Hello.", "u Rain?", "A Rain."]]),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_between_two_people_the_source_says_who_answers(tmp_path, answers, expected, named):
    if answers == "Bo" and not named:
        answers = "second"
    messages = TALK if named else [message["content"] for message in TALK]
    document = read_row(tmp_path, {"messages": messages}, answers=answers)
    assert [shown(view) for view in document.views] == expected


def test_of_more_people_one_can_answer_by_name(tmp_path):
    messages = [*TALK, *say(("Cy", "Snow!"), ("Bo", "No."))]
    (view,) = read_row(tmp_path, {"messages": messages}, answers="Bo").views
    assert shown(view)[-2:] == ["u Snow!", "A No."]


def test_last_learns_the_last_answer_alone(tmp_path):
    (view,) = read_row(tmp_path, {"messages": [*PAIR, *PAIR]}, answers="last").views
    assert shown(view) == ["u So?", "a Yes.", "u So?", "A Yes."]


def test_a_source_names_its_own_roles(tmp_path):
    row = {"messages": say(("narrator", "A room."), ("player", "Look."), ("master", "Dark."))}
    roles = {"narrator": "system", "player": "user", "master": "assistant"}
    (view,) = read_row(tmp_path, row, roles=roles).views
    assert shown(view) == ["s A room.", "u Look.", "A Dark."]


def test_a_system_prompt_of_the_row_comes_before_that_of_the_source(tmp_path):
    (view,) = read_row(tmp_path, {"messages": PAIR}, system="Source's.").views
    assert shown(view)[0] == "s Source's."
    (view,) = read_row(tmp_path, {"messages": PAIR, "system": "Row's."}, system="Source's.").views
    assert shown(view)[0] == "s Row's."


PARTS = [{"type": "image"}]
BAD = {
    "unknown role": ({"messages": say(("judge", "So?"), ("assistant", "Yes."))}, "message 1 .* unknown role 'judge'"),
    "tool": ({"messages": [*PAIR, *say(("tool", "5"))]}, "message 3 of 'messages' has the unknown role 'tool'; name"),
    "no role": ({"messages": [{"content": "So?"}, PAIR[1]]}, "message 1 of 'messages' has no role; between two people"),
    "role of a number": ({"messages": [{"role": 1, "content": "So?"}]}, "message 1 .* has a number as its role"),
    "no answer": ({"messages": PAIR[:1]}, "has no answer: no message that may be learned is the assistant's"),
    "no answer to learn": ({"messages": [PAIR[0], {**PAIR[1], "train": False}]}, "has no answer"),
    "empty question": ({"messages": [{"role": "user", "content": " \n"}, PAIR[1]]}, r"message 1 .* \(user\) is empty"),
    "empty answer": ({"messages": [PAIR[0], {"role": "assistant", "content": ""}]}, r"message 2 .* is empty"),
    "no content": ({"messages": [PAIR[0], {"role": "assistant"}]}, r"message 2 of 'messages' \(assistant\) is empty"),
    "NUL alone": ({"messages": [PAIR[0], {"role": "assistant", "content": "\0"}]}, "message 2 .* is empty"),
    "content of a number": ({"messages": [{"role": "user", "content": 5}]}, "message 1 .* holds a number, not text"),
    "an image": ({"messages": [{"role": "user", "content": PARTS}]}, "message 1 .* a part of the kind 'image'"),
    "a tool call": ({"messages": [{**PAIR[1], "tool_calls": [{}]}]}, "message 1 .* calls tools, and only text is read"),
    "late system": ({"messages": [*PAIR, *say(("system", "Now."))]}, "message 3 .* is a system prompt, .* come first"),
    "system of a number": ({"messages": PAIR, "system": 3}, "its field 'system' holds a number, not text"),
    "no messages": ({"messages": []}, "its field 'messages' holds no message"),
    "messages of text": ({"messages": "So?"}, "its field 'messages' holds text, not a list of messages"),
    "null": ({"messages": None}, "has no field 'messages'"),
    "a message of a number": ({"messages": [4]}, "message 1 of 'messages' is a number, not an object with role"),
    "nothing known": ({"body": "So?"}, "has no field 'text', and the fields of no conversation"),
    "alpaca without output": ({"instruction": "Add.", "output": ""}, r"'output' \(assistant\) is empty"),
    "alpaca input": ({"instruction": "Add.", "input": 3, "output": "3"}, "'input' holds a number, not text"),
    "alpaca history": ({"instruction": "a", "output": "b", "history": ["c"]}, "pair 1 of 'history' is not a list of a"),
    "prompt of a number": ({"prompt": 4, "completion": "5"}, "'prompt' holds a number, not text"),
    "completion of a user": ({"prompt": "So?", "completion": say(("user", "Yes."))}, "has no answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_left_out_with_place_and_reason(tmp_path, name):
    row, reason = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"messages": PAIR}) + "\n")
    bad, good = read(path)
    assert (bad.problem, bad.text, bad.views, bad.name) == ("malformed", None, (), f"file://{path}, line 1")
    assert re.search(reason, bad.reason), bad.reason
    assert good.views


@pytest.mark.parametrize(
    ("answers", "messages", "reason"),
    [
        ("second", [*TALK, *say(("Cy", "Snow!"))], r"has 3 people \(Ada, Bo, Cy\), and `answers: second` is for two"),
        ("both", TALK[:1], "has no answer: `answers` is both, and only Ada speaks"),
        ("Cy", TALK, "has no answer: `answers` is Cy, and only Ada, Bo speaks"),
        ("Cy", ["Hi.", "Hello."], "message 1 of 'messages' has no role"),
    ],
)
def test_people_of_whom_nobody_can_answer_are_left_out(tmp_path, answers, messages, reason):
    document = read_row(tmp_path, {"messages": messages}, answers=answers)
    assert document.problem == "malformed"
    assert re.search(reason, document.reason), document.reason


def test_a_conversation_with_a_text_that_is_gone_is_dropped(tmp_path):
    row = {"messages": [PAIR[0], {"role": "assistant", "content": " [deleted]"}]}
    assert read_row(tmp_path, row, drop_texts=["[deleted]"]).problem == "dropped"


def test_a_conversation_that_is_too_long_or_not_utf_8_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": PAIR}) + "\n")
    (document,) = read_documents(source(path), max_document_bytes=40)
    assert document.problem == "oversize"
    assert read_row(tmp_path, {"messages": [PAIR[0], {"role": "gpt", "content": "\ud800"}]}).problem == "undecodable"


def test_text_layout_reads_text_as_before_and_auto_prefers_text(tmp_path):
    row = {"text": "So? Yes.", "messages": PAIR}
    for layout in ("text", "auto"):
        document = read_row(tmp_path, row, layout=layout)
        assert (document.text, document.views) == ("So? Yes.", ())
    assert read_row(tmp_path, row, layout="messages").views
    assert read_row(tmp_path, {"messages": PAIR}, layout="text").reason == "has no field 'text'"


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_parquet_and_datasets_give_the_conversations_of_json_lines(tmp_path):
    rows = [{"messages": PAIR, "who": "Ada", "n": 1}, {"messages": [*PAIR, *PAIR], "who": "Bo", "n": 2}]
    write_parquet(tmp_path / "a.parquet", rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    expected = [(d.text, d.group, d.views) for d in read(tmp_path / "a.jsonl", group_field="who")]
    for path, changes in ((tmp_path / "a.parquet", {}), (tmp_path / "saved", {"format": "datasets"})):
        found = read(path, group_field="who", **changes)
        assert [(document.text, document.group, document.views) for document in found] == expected


def test_a_parquet_row_that_is_not_utf_8_is_undecodable_alone(tmp_path):
    raw = pa.array([b"3", b"\xff", b"5"], pa.binary())
    outputs = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"instruction": ["a", "b", "c"], "output": outputs}), tmp_path / "a.parquet")
    assert [document.problem for document in read(tmp_path / "a.parquet")] == [None, "undecodable", None]


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("sharegpt", "has no column 'conversations'; its columns are body"),
        ("auto", "has no column 'text', nor those of a conversation .messages, conversations, instruction/output,"),
    ],
)
def test_a_table_without_the_columns_of_its_layout_is_refused(tmp_path, layout, problem):
    write_parquet(tmp_path / "a.parquet", [{"body": "So?"}])
    with pytest.raises(SourceUnreadable, match=problem):
        read(tmp_path / "a.parquet", layout=layout)


def test_a_text_file_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("So?")
    assert read(tmp_path / "a.txt")[0].text == "So?"
    with pytest.raises(SourceUnreadable, match="is plain text, and `layout: messages` is of rows"):
        read(tmp_path / "a.txt", layout="messages")


def test_a_conversation_is_not_split(tmp_path):
    with pytest.raises(ValidationError, match="split_texts splits texts, and a conversation is one document"):
        source(tmp_path, layout="messages", split_texts="lines")
    assert read_row(tmp_path, {"messages": PAIR}, split_texts="lines").views
