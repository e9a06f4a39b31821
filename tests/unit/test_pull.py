"""Downloads from a hub that fails on purpose: resumed, or refused with nothing half in place."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import llamactor
from llamactor import (
    ChecksumError,
    DownloadError,
    DownloadProgress,
    LoadCancelledError,
    ModelLoadError,
    ModelNotFoundError,
    ModelStore,
    StoredModel,
)
from llamactor.store import store as store_module
from llamactor.store import transfer
from tests import models
from tests.conftest import PATIENCE, meanwhile
from tests.hub import COMMIT, Hub, running

REPO = "owner/Tiny-GGUF"
FILE = "Tiny-Q4_K_M.gguf"

pytestmark = pytest.mark.usefixtures("no_models")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture(scope="module")
def content(tiny_model_path: Path) -> bytes:
    return tiny_model_path.read_bytes()


def files_of(store: ModelStore) -> list[str]:
    """What lies in the store, its database aside."""
    files = [path.relative_to(store.path).as_posix() for path in store.path.rglob("*")]
    return sorted(name for name in files if (store.path / name).is_file() and "sqlite" not in name)


# --- what works ---------------------------------------------------------------------------------


async def test_a_model_is_downloaded_checked_and_recorded(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    hub.license = "apache-2.0"
    told: list[DownloadProgress] = []
    model = await store.pull(f"hf:{REPO}", progress=told.append)
    assert model.path == store.path / REPO / FILE
    assert model.path.read_bytes() == content
    assert (model.name, model.license) == ("Tiny-Q4_K_M", "apache-2.0")
    assert (model.source, model.owned) == (f"hf:{REPO}/{FILE}", True)
    assert model.sha256 == file.sha256
    assert files_of(store) == [f"{REPO}/{FILE}"]
    assert [state.fraction for state in told] == sorted(state.fraction for state in told)
    assert told[-1] == DownloadProgress(FILE, len(content), len(content))
    assert (await store.verify())[0].ok


async def test_what_is_here_is_not_downloaded_again(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    first = await store.pull(f"hf:{REPO}")
    assert await store.pull(f"hf:{REPO}/{FILE}") == first
    assert await store.resolve(f"hf:{REPO}:q4_k_m") == first.path
    assert (file.sent, len(await store.list())) == (len(content), 1)
    with pytest.raises(ValueError, match="rename"):
        await store.pull(f"hf:{REPO}", name="another")


async def test_a_reference_without_a_file_takes_a_middling_quantisation(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    for quantization in ("F16", "Q8_0", "Q4_K_M", "Q2_K"):
        hub.add(REPO, f"Tiny-{quantization}.gguf", content + bytes(len(quantization)))
    hub.add(REPO, "mmproj-Tiny-f16.gguf", b"a projector")
    hub.add(REPO, "README.md", b"# Tiny", large=False)
    assert (await store.pull(f"hf:{REPO}")).path.name == "Tiny-Q4_K_M.gguf"
    assert (await store.pull(f"hf:{REPO}:q8_0")).path.name == "Tiny-Q8_0.gguf"
    branch = await store.pull(f"hf:{REPO}@main:F16")
    assert branch.path == store.path / f"{REPO}@main" / "Tiny-F16.gguf"
    assert branch.source == f"hf:{REPO}@main/Tiny-F16.gguf"
    assert await store.resolve(f"hf:{REPO}@main") == branch.path
    with pytest.raises(ModelNotFoundError, match=r"no Q4_K_S; there are Q4_K_M"):
        await store.pull(f"hf:{REPO}:Q4_K_S")
    with pytest.raises(ModelNotFoundError, match=r"no Tiny-Q4_K\.gguf; there are Tiny-Q4_K_M"):
        await store.pull(f"hf:{REPO}/Tiny-Q4_K.gguf")


async def test_all_parts_of_a_split_model_come(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    parts = models.tiny_split(tmp_path)
    for part in parts:
        hub.add(REPO, f"split/{part.name}", part.read_bytes())
    model = await store.pull(f"hf:{REPO}")
    folder = store.path / REPO / "split"
    assert [file.path for file in model.files] == [folder / part.name for part in parts]
    assert model.name == "tiny-split"
    async with llamactor.load_model(model.path) as loaded:
        assert loaded.info.parameters == model.parameters


async def test_a_name_that_counts_no_parts_is_that_of_a_whole_model(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    hub.add(REPO, "Tiny-00001-of-00000.gguf", content)
    assert (await store.header(f"hf:{REPO}")).architecture == "llama"
    model = await store.pull(f"hf:{REPO}")
    assert [file.path.name for file in model.files] == ["Tiny-00001-of-00000.gguf"]


async def test_a_small_file_is_checked_by_what_git_calls_it(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content, large=False)
    assert (await store.pull(f"hf:{REPO}")).sha256 == hashlib.sha256(content).hexdigest()
    await store.remove("Tiny-Q4_K_M")
    file.blob = "0" * 40
    with pytest.raises(ChecksumError, match="0000"):
        await store.pull(f"hf:{REPO}")


async def test_a_header_is_read_without_the_file(
    hub: Hub, store: ModelStore, content: bytes, tiny_model_path: Path
) -> None:
    file = hub.add(REPO, FILE, content)
    header = await store.header(f"hf:{REPO}")
    here = await store.header(tiny_model_path)
    assert (header.metadata, header.tensors) == (here.metadata, here.tensors)
    assert (header.source, header.size_bytes) == (f"hf:{REPO}/{FILE}", len(content))
    assert file.sent <= 1 << 20
    assert files_of(store) == []


async def test_load_model_downloads_loads_and_counts(
    hub: Hub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACTOR_MODELS_DIR", str(tmp_path / "default"))
    hub.add(REPO, FILE, content)
    loading = llamactor.load_model(f"hf:{REPO}:Q4_K_M")
    told = [progress async for progress in loading]
    async with loading as model:
        assert model.info.architecture == "llama"
    fractions = [progress.fraction for progress in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {"downloading", "ready"} <= {progress.stage for progress in told}
    async with llamactor.load_model("tiny-q4_k_m") as model:
        assert model.info.path == str(tmp_path / "default" / REPO / FILE)
    assert (await ModelStore().get("Tiny-Q4_K_M")).usage_count == 2


# --- what was here under another name -----------------------------------------------------------

OTHER = "other/Tiny-GGUF"


async def known(store: ModelStore, hub: Hub, path: Path, origin: str) -> StoredModel:
    """A model that came into the store in one way or another."""
    if origin == "hub":
        hub.add(OTHER, FILE, path.read_bytes())
        return await store.pull(f"hf:{OTHER}")
    if origin == "lmstudio":
        found = Path.home() / ".lmstudio/models/owner/repo/Found.gguf"
        found.parent.mkdir(parents=True)
        shutil.copy(path, found)
        await store.discover()
        await store.verify("found")  # from now on its checksum is known
        return await store.get("found")
    return await store.import_(path, copy=origin == "copy")


@pytest.mark.parametrize("origin", ["import", "copy", "hub", "lmstudio"])
async def test_what_was_here_already_is_found_by_the_reference_that_it_was_pulled_by(
    hub: Hub,
    store: ModelStore,
    tiny_model_path: Path,
    origin: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = await known(store, hub, tiny_model_path, origin)
    file = hub.add(REPO, FILE, tiny_model_path.read_bytes())
    for _ in range(2):
        pulled = await store.pull(f"hf:{REPO}")
        assert pulled.pulled_as == (f"hf:{REPO}/{FILE}",)
        assert (pulled.name, pulled.path, pulled.source) == (
            *(before.name, before.path, before.source),
        )
    assert file.requests == []
    assert await store.list(REPO) == [pulled]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ref in (f"hf:{REPO}", f"hf:{REPO}:Q4_K_M", f"hf:{REPO}/{FILE}"):
        assert await store.resolve(ref) == before.path
        await store.note_use(ref)
    assert (await store.get(before.name)).usage_count == 3


async def test_a_reference_means_what_it_was_pulled_as_last(
    hub: Hub, store: ModelStore, content: bytes, tiny_model_path: Path, tmp_path: Path
) -> None:
    contents = [content, *(content[:-1] + bytes([byte]) for byte in b"xy")]
    first = await store.import_(tiny_model_path, name="first")
    (tmp_path / "second.gguf").write_bytes(contents[1])
    second = await store.import_(tmp_path / "second.gguf")
    found = []
    for index in (0, 1, 0, 2, 0):
        hub.add(REPO, FILE, contents[index])
        found.append((await store.pull(f"hf:{REPO}")).path)
        assert await store.resolve(f"hf:{REPO}") == found[-1]
    assert found == [first.path, second.path, first.path, store.path / REPO / FILE, first.path]
    assert (await store.get("second")).pulled_as == ()


async def test_an_imported_file_that_was_pulled_stays_an_imported_one(
    hub: Hub, store: ModelStore, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(content)
    await store.import_(path)
    hub.add(REPO, FILE, content)
    await store.pull(f"hf:{REPO}")
    path.unlink()
    await store.discover()
    assert (await store.get("mine")).source == "import"  # what is gone may come back
    path.write_bytes(content[:-1] + b"x")
    assert (await store.import_(path)).pulled_as == ()  # it is another one
    assert (await store.pull(f"hf:{REPO}")).path == store.path / REPO / FILE


# --- failures that pass -------------------------------------------------------------------------


async def test_a_connection_that_drops_at_40_percent_is_resumed(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.drops = [len(content) * 2 // 5]
    model = await store.pull(f"hf:{REPO}")
    assert model.path.read_bytes() == content
    assert file.requests[0] == ""
    assert file.requests[1].startswith("bytes=")
    assert file.sent == len(content)  # no byte came twice


async def test_many_drops_are_resumed_while_something_arrives(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.drops = [len(content) * n // 20 for n in range(1, 20)]
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content
    assert len(file.requests) == 20


async def test_errors_of_the_server_that_pass_are_tried_again(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    hub.statuses = [500, 503]
    file = hub.add(REPO, FILE, content)
    file.statuses = [500, 502, 503, 429]
    file.drops = [-1]
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content


async def test_a_server_that_knows_no_ranges_sends_all_of_it_again(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.drops = [len(content) // 2]
    file.ranges = False
    told: list[DownloadProgress] = []
    assert (await store.pull(f"hf:{REPO}", progress=told.append)).path.read_bytes() == content
    assert told[-1].fraction == 1.0


async def test_a_connection_that_falls_silent_is_taken_up_again(
    hub: Hub, store: ModelStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    file = hub.add(REPO, FILE, content)
    file.stalls = [len(content) // 2]
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content
    assert file.requests == ["", f"bytes={len(content) // 2}-"]


async def test_files_may_lie_on_another_server_which_sees_no_token(
    hub: Hub, store: ModelStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    hub.add(REPO, FILE, content)
    storage = Hub()
    file = storage.add(REPO, FILE, content)
    file.drops = [len(content) // 2]
    with running(storage) as address:
        hub.storage = address.replace("127.0.0.1", "localhost")
        assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content
    assert set(hub.authorized) == {"Bearer hf_secret"}
    assert set(storage.authorized) == {None}
    assert file.sent == len(content)


# --- failures that stay -------------------------------------------------------------------------


async def test_what_a_failed_download_has_left_is_gone_on_with(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.drops = [len(content) * 2 // 5, *[-1] * (transfer.RETRIES + 1)]
    with pytest.raises(DownloadError, match="gave up after 6 attempts"):
        await store.pull(f"hf:{REPO}")
    (partial,) = files_of(store)
    assert partial.endswith(".part")
    assert await store.list() == []
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content
    assert files_of(store) == [f"{REPO}/{FILE}"]
    assert file.sent == len(content)


@pytest.mark.parametrize("by", [-100, 100])
async def test_another_length_than_announced_is_refused(
    hub: Hub, store: ModelStore, content: bytes, by: int
) -> None:
    hub.add(REPO, FILE, content).announced += by
    with pytest.raises(DownloadError, match=f"{len(content)} bytes.*announced {len(content) + by}"):
        await store.pull(f"hf:{REPO}")
    assert files_of(store) == []
    assert await store.list() == []


async def test_another_checksum_than_announced_is_refused(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.content = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(ChecksumError, match=file.sha256):
        await store.pull(f"hf:{REPO}")
    assert files_of(store) == []
    assert await store.list() == []


async def test_a_file_that_is_no_model_is_refused(hub: Hub, store: ModelStore) -> None:
    hub.add(REPO, FILE, b"<!doctype html>" * 100)
    with pytest.raises(ModelLoadError, match="web page"):
        await store.pull(f"hf:{REPO}")
    with pytest.raises(ModelLoadError, match="web page"):
        await store.header(f"hf:{REPO}")
    assert files_of(store) == []


async def test_a_model_that_cannot_be_loaded_is_refused(
    hub: Hub, store: ModelStore, tmp_path: Path
) -> None:
    hub.add(REPO, FILE, models.no_vocab(tmp_path / "mute.gguf").read_bytes())
    with pytest.raises(ModelLoadError, match="tokenizer"):
        await store.pull(f"hf:{REPO}")
    assert files_of(store) == []


async def test_what_the_hub_has_not_is_named(hub: Hub, store: ModelStore, content: bytes) -> None:
    hub.add(REPO, "model.safetensors", content)
    with pytest.raises(ModelNotFoundError, match="no such repository"):
        await store.pull("hf:owner/nothing")
    with pytest.raises(ModelNotFoundError, match=r"holds no \.gguf"):
        await store.pull(f"hf:{REPO}")
    with pytest.raises(ModelNotFoundError, match="no such"):
        await store.pull(f"hf:{REPO}@elsewhere")
    with pytest.raises(ModelNotFoundError, match="owner and repository"):
        await store.pull("hf:owner")
    with pytest.raises(ModelNotFoundError, match=r"no \.gguf file"):
        await store.pull(f"hf:{REPO}/../x.gguf")


async def test_a_part_that_the_hub_lacks_is_named(
    hub: Hub, store: ModelStore, tmp_path: Path
) -> None:
    first, *_ = models.tiny_split(tmp_path)
    hub.add(REPO, first.name, first.read_bytes())
    with pytest.raises(ModelNotFoundError, match="00002-of-00003"):
        await store.pull(f"hf:{REPO}")


async def test_a_token_is_sent_where_there_is_one(
    hub: Hub, store: ModelStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, FILE, content)
    hub.token = "hf_secret"
    with pytest.raises(ModelNotFoundError, match="HF_TOKEN"):
        await store.pull(f"hf:{REPO}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content


async def test_offline_only_what_is_here_is_found(
    hub: Hub, store: ModelStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, FILE, content)
    model = await store.pull(f"hf:{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert await store.pull(f"hf:{REPO}:Q4_K_M") == model
    assert await store.resolve(f"hf:{REPO}") == model.path
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        await store.pull(f"hf:{REPO}:Q8_0")


async def test_a_hub_that_is_not_there_is_named(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="gave up after 3 attempts"):
        await store.pull(f"hf:{REPO}")


async def test_without_the_library_the_extra_is_named(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"pip install 'llamactor\[hub\]'"):
        await store.pull(f"hf:{REPO}")


async def test_a_disk_that_is_too_small_is_named_before_anything_comes(
    hub: Hub, store: ModelStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hub.add(REPO, FILE, content)
    usage = shutil.disk_usage(store.path.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=f"needs {len(content)} more bytes, 1000 are free"):
        await store.pull(f"hf:{REPO}")
    assert file.requests == []


async def test_names_that_lead_out_of_the_store_are_not_followed(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    hub.add(REPO, "../../Out-Q4_K_M.gguf", content)
    with pytest.raises(ModelNotFoundError, match="holds no"):
        await store.pull(f"hf:{REPO}")
    with pytest.raises(ModelNotFoundError):
        await store.pull("hf:../..:Q4_K_M")


async def test_a_name_that_is_taken_is_refused_before_anything_comes(
    hub: Hub, store: ModelStore, content: bytes, tiny_model_path: Path
) -> None:
    file = hub.add(REPO, FILE, content + bytes(32))
    await store.import_(tiny_model_path, name="mine")
    with pytest.raises(ValueError, match="belongs to another"):
        await store.pull(f"hf:{REPO}", name="Mine")
    assert file.requests == []


async def test_the_name_of_a_copy_is_refused_before_anything_comes(
    hub: Hub, store: ModelStore, content: bytes, tiny_model_path: Path
) -> None:
    file = hub.add(REPO, FILE, content + bytes(32))
    await store.import_(tiny_model_path, copy=True, name="mine")
    with pytest.raises(ValueError, match="belongs to another"):
        await store.pull(f"hf:{REPO}", name="mine")
    assert file.requests == []


async def test_another_name_for_what_is_recorded_is_refused_before_anything_comes(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    hub.add(REPO, FILE, content)
    await store.pull(f"hf:{REPO}")
    newer = hub.add(REPO, FILE, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="rename"):
        await store.pull(f"hf:{REPO}", name="another")
    assert newer.requests == []
    assert (await store.verify())[0].ok
    assert (await store.pull(f"hf:{REPO}", name="Tiny-Q4_K_M")).sha256 == newer.sha256


async def test_a_model_of_the_hub_s_cache_is_renewed_under_the_name_that_it_was_given(
    hub: Hub, store: ModelStore, content: bytes, tmp_path: Path
) -> None:
    cached = tmp_path / "cache/models--owner--Tiny-GGUF/snapshots/c1" / FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    await store.discover()
    await store.update("Tiny-Q4_K_M", rename="mine")
    hub.add(REPO, FILE, content[:-1] + bytes([content[-1] ^ 1]))
    assert (await store.pull(f"hf:{REPO}", name="mine")).path == store.path / REPO / FILE
    assert [model.name for model in await store.list(REPO)] == ["mine"]


# --- cancelling, and others who do the same -----------------------------------------------------


async def test_cancelling_keeps_what_has_arrived_and_the_next_pull_goes_on(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.stalls = [len(content) // 2]
    pull = asyncio.create_task(store.pull(f"hf:{REPO}"))
    assert await asyncio.to_thread(hub.stalled.wait, PATIENCE)
    partial = await until_written(store, len(content) // 2)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert files_of(store) == [partial]
    assert await store.list() == []
    hub.release.set()
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content
    assert file.requests[-1] == f"bytes={len(content) // 2}-"


async def until_written(store: ModelStore, size: int) -> str:
    """Wait until a partial file has `size` bytes, and return its name."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for name in files_of(store):
                if (store.path / name).stat().st_size >= size:
                    return name
            await asyncio.sleep(0.001)


async def test_cancelling_a_load_ends_its_download(
    hub: Hub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACTOR_MODELS_DIR", str(tmp_path / "default"))
    hub.add(REPO, FILE, content).stalls = [len(content) // 2]
    loading = llamactor.load_model(f"hf:{REPO}")
    assert await asyncio.to_thread(hub.stalled.wait, PATIENCE)
    loading.cancel()
    with pytest.raises(LoadCancelledError):
        await loading
    assert await ModelStore().list() == []


async def test_cancelling_does_not_wait_for_a_hub_that_does_not_answer(
    hub: Hub, store: ModelStore
) -> None:
    hub.is_silent = True
    pull = asyncio.create_task(store.pull(f"hf:{REPO}"))
    assert await asyncio.to_thread(hub.stalled.wait, PATIENCE)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert not hub.release.is_set()


async def test_prune_removes_what_was_left_but_not_what_is_being_written(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    file.stalls = [len(content) // 2]
    pull = asyncio.create_task(store.pull(f"hf:{REPO}"))
    assert await asyncio.to_thread(hub.stalled.wait, PATIENCE)
    await until_written(store, len(content) // 2)
    assert await store.prune() == 0
    pull.cancel()
    await asyncio.wait([pull])
    assert await store.prune() == len(content) // 2
    assert files_of(store) == []


async def test_two_pulls_of_one_model_download_it_once(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    first, second = await asyncio.gather(
        store.pull(f"hf:{REPO}"), ModelStore(store.path).pull(f"hf:{REPO}/{FILE}")
    )
    assert first.path == second.path
    assert len(await store.list()) == 1
    assert file.sent == len(content)


async def test_a_file_whose_record_was_lost_is_not_downloaded_again(
    hub: Hub, store: ModelStore, content: bytes
) -> None:
    file = hub.add(REPO, FILE, content)
    await store.pull(f"hf:{REPO}")
    for database in store.path.glob("store.sqlite3*"):
        database.unlink()
    assert (await store.pull(f"hf:{REPO}")).sha256 == file.sha256
    assert file.sent == len(content)
    assert files_of(store) == [f"{REPO}/{FILE}"]


@pytest.mark.parametrize("after", [False, True])
async def test_what_is_removed_while_it_is_pulled_is_downloaded(
    hub: Hub, store: ModelStore, content: bytes, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hub.add(REPO, FILE, content)
    model = await store.pull(f"hf:{REPO}")

    def remove() -> None:
        asyncio.run(ModelStore(store.path).remove(model.name))

    meanwhile(monkeypatch, store_module, "read_header", remove, after=after)
    assert (await store.pull(f"hf:{REPO}")).path.read_bytes() == content
    assert file.sent == 2 * len(content)


async def test_a_damaged_download_is_replaced(hub: Hub, store: ModelStore, content: bytes) -> None:
    hub.add(REPO, FILE, content)
    model = await store.pull(f"hf:{REPO}")
    model.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not (await store.verify())[0].ok
    with pytest.raises(ChecksumError, match="quarantine"):
        await store.resolve(f"hf:{REPO}")
    assert (await store.pull(f"hf:{REPO}")).quarantined is None
    assert model.path.read_bytes() == content
    assert (await store.verify())[0].ok


# --- as a user would ----------------------------------------------------------------------------

PROGRAM = """
import asyncio, llamactor

async def main():
    model = await llamactor.ModelStore().pull("hf:owner/Tiny-GGUF", progress=lambda state: None)
    print(model.name, model.size_bytes)

asyncio.run(main())
"""


def test_endpoint_and_cache_are_those_of_the_environment(content: bytes, tmp_path: Path) -> None:
    hub = Hub()
    hub.add(REPO, FILE, content)
    with running(hub) as address:
        environment: dict[str, Any] = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "LLAMACTOR_MODELS_DIR": str(tmp_path / "models"),
        }
        command = [sys.executable, "-W", "error", "-c", PROGRAM]
        done = subprocess.run(
            command, capture_output=True, check=False, env=environment, text=True, timeout=PATIENCE
        )
    assert (done.stdout, done.stderr) == (f"Tiny-Q4_K_M {len(content)}\n", "")
    assert hub.asked == 1
    assert COMMIT not in str(files_of(ModelStore(tmp_path / "models")))
