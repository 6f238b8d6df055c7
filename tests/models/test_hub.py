"""Models that are named and not there: the hub is away, gives none of this name, or a folder is misspelt."""

from __future__ import annotations

import errno
import os
import sys

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from softshard.errors import HubUnavailable, ModelInvalid, ModelMissing, OutputUnusable, StorageFull
from softshard.models import resolve_model

HTTP = sys.modules[hub_errors.HTTPError.__module__]
"""The library by which huggingface_hub sends requests."""


def answer(status):
    response = HTTP.Response(status, request=HTTP.Request("GET", "https://hub.example/api"))
    return hub_errors.HfHubHTTPError(f"HTTP {status}", response=response)


def not_cached(cause):
    error = hub_errors.LocalEntryNotFoundError("no snapshot")
    error.__cause__ = cause
    return error


@pytest.fixture
def hub(monkeypatch):
    """Has every request to the hub end with an error."""

    def fail(error):
        def snapshot_download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answer(503), "HTTP 503"),
        (answer(429), "HTTP 429"),
        (not_cached(answer(500)), "HTTP 500"),
        (not_cached(HTTP.ConnectError("refused")), "ConnectError"),
        (not_cached(hub_errors.OfflineModeIsEnabled("offline")), "OfflineModeIsEnabled"),
        (HTTP.RemoteProtocolError("cut in the middle of a shard"), "RemoteProtocolError"),
        (HTTP.ReadTimeout("no answer"), "ReadTimeout"),
    ],
    ids=repr,
)
def test_hub_that_is_away_is_a_reason_to_try_again(hub, error, reason):
    hub(error)
    with pytest.raises(HubUnavailable, match=rf"nobody/nothing: .*\({reason}\)") as caught:
        resolve_model("nobody/nothing")
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("error", [answer(404), answer(401), hub_errors.HFValidationError("x")], ids=repr)
def test_name_that_the_hub_does_not_know_is_refused(hub, error):
    hub(error)
    with pytest.raises(ModelInvalid, match="nobody/nothing: no such folder, and the hub gives none of this name"):
        resolve_model("nobody/nothing")


@pytest.mark.parametrize("named", ["./tiny", "../here/tiny", "{here}/tiny", "{here}/tiny/"])
def test_misspelt_folder_is_named_with_the_one_that_is_there(tmp_path, monkeypatch, named):
    here = tmp_path / "here"
    for name in ("tinny", "other", "tin.txt"):
        (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    model = named.format(here=here)
    with pytest.raises(ModelMissing) as caught:
        resolve_model(model)
    assert caught.value.exit_code == 2
    assert f"(did you mean {model.rstrip('/').removesuffix('tiny')}tinny?)" in str(caught.value)


def test_name_of_a_hub_model_that_looks_like_a_folder_beside_is_hinted_at(tmp_path, monkeypatch, hub):
    (tmp_path / "tinny").mkdir()
    monkeypatch.chdir(tmp_path)
    hub(answer(404))
    with pytest.raises(ModelInvalid, match=r"tiny: no such folder \(did you mean \./tinny\?\)"):
        resolve_model("tiny")
    hub(answer(503))
    with pytest.raises(HubUnavailable, match=r"\(did you mean \./tinny\?\)"):
        resolve_model("tiny")


def test_folder_without_a_neighbour_of_almost_its_name_gets_no_hint(tmp_path):
    (tmp_path / "enormous").mkdir()
    for model in (tmp_path / "tiny", tmp_path / "no/tiny"):
        with pytest.raises(ModelMissing, match="no such folder;"):
            resolve_model(str(model))


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EROFS, OutputUnusable)])
def test_cache_of_the_hub_that_cannot_be_written_is_named_and_not_the_model(hub, number, kind):
    hub(OSError(number, os.strerror(number), "/cache/models--nobody--nothing/blobs/1"))
    with pytest.raises(kind, match=r"/cache|hub") as caught:
        resolve_model("nobody/nothing")
    assert "gives none of this name" not in str(caught.value)
    assert caught.value.exit_code == {StorageFull: 75, OutputUnusable: 2}[kind]
